"""Measure training steps alone and beside as many busy programs as there are cores.

python bench/busy_cores.py shakespeare.txt --preset mini    (any settings of train.py; Linux)

Once as they are, and once with threads that wait for each other as long as OpenMP has them wait.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROUNDS, STEPS = 7, 15
# The default is that of libgomp, wait_policy undefined, in env.c.
SETTINGS = {"chargpt": {}, "OpenMP's default": {"GOMP_SPINCOUNT": "300000"}}
BUSY = [sys.executable, "-c", "while True: pass"]


def time_steps() -> None:
    """Print the median time of a step in milliseconds."""
    import train

    with tempfile.TemporaryDirectory() as empty:
        run = train.begin(*train.command_line().parse([*sys.argv[2:], "--out", empty]))
    take_step, seconds = train.step_function(run), []
    for step in range(5 + STEPS):
        began = time.perf_counter()
        take_step(step, 10**6).item()
        seconds.append(time.perf_counter() - began)
    print(1000 * statistics.median(seconds[5:]))


def main() -> None:
    """Time both in turn, each time in a new process, because it is set when torch is loaded."""
    milliseconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for n_busy in (0, os.cpu_count()):
            busy = [subprocess.Popen(BUSY) for _ in range(n_busy)]
            try:
                for name, setting in SETTINGS.items():
                    words = [sys.executable, __file__, "--", *sys.argv[1:]]
                    answer = subprocess.run(
                        words, env=os.environ | setting, stdout=subprocess.PIPE, check=True
                    )
                    figure = float(answer.stdout.split()[-1])
                    milliseconds.setdefault((name, n_busy), []).append(figure)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    print("| ms a step, median (slowest) | alone | beside busy programs |\n|---|---|---|")
    for name in SETTINGS:
        cells = [
            f"{statistics.median(times):,.1f} ({max(times):,.1f})"
            for times in (milliseconds[name, n_busy] for n_busy in (0, os.cpu_count()))
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    ours, theirs = (milliseconds[name, 0] for name in SETTINGS)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"alone, chargpt takes {ratio:.2f} times as long, in the median of the rounds")


if __name__ == "__main__":
    time_steps() if sys.argv[1] == "--" else main()
