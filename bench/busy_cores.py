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

from command_line import output_of, parse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROUNDS, WARM_UP, STEPS = 7, 5, 15
CORES = len(os.sched_getaffinity(0))
# The default is libgomp's own, from its env.c.
SETTINGS = {"chargpt": {}, "OpenMP's default": {"GOMP_SPINCOUNT": "300000"}}
# It ends when this script does, however that ends.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def time_steps() -> None:
    """Print the median time of a step in milliseconds."""
    # Only here: the process that starts this one shall not have its setting.
    import train
    from config.script import bad_input_exits

    with tempfile.TemporaryDirectory() as empty, bad_input_exits("busy_cores.py"):
        run = train.begin(*train.command_line().parse([*sys.argv[2:], "--out", empty]))
    take_step, seconds = train.step_function(run), []
    for step in range(WARM_UP + STEPS):
        began = time.perf_counter()
        take_step(step, 10**6).item()
        seconds.append(time.perf_counter() - began)
    print(1000 * statistics.median(seconds[WARM_UP:]))


def main() -> None:
    """Time both in turn, in new processes, because the setting is read when torch is loaded."""
    asked = parse(__doc__, "settings of train.py", text=str)
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    milliseconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for n_busy in (0, CORES):
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_busy)]
            try:
                for name, setting in SETTINGS.items():
                    command = [sys.executable, __file__, "--", asked.text, *asked.words]
                    figure = float(output_of(command, env=environment | setting).split()[-1])
                    milliseconds.setdefault((name, n_busy), []).append(figure)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    print("| ms a step, median (slowest) | alone | beside busy programs |\n|---|---|---|")
    for name in SETTINGS:
        cells = [
            f"{statistics.median(times):,.1f} ({max(times):,.1f})"
            for times in (milliseconds[name, n_busy] for n_busy in (0, CORES))
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    ours, theirs = (milliseconds[name, 0] for name in SETTINGS)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"alone, chargpt takes {ratio:.2f} times as long, in the median of the rounds")


if __name__ == "__main__":
    time_steps() if sys.argv[1:2] == ["--"] else main()
