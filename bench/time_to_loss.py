"""Measure how long whole processes take to a validation loss, over seeds.

python bench/time_to_loss.py 1.898 5 book.txt --preset mini    (loss, seeds, arguments of train.py)
"""

import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import end_if_failed, parse, whole_number

import train
from checkpoint import read_log


def main() -> None:
    """Run train.py once for each seed and print when it reached the loss, and where it ended."""
    asked = parse(__doc__, "settings of train.py", loss=float, seeds=whole_number, text=str)
    target, seeds, words = asked.loss, asked.seeds, [asked.text, *asked.words]
    reached_after, trained_for, took, losses = [], [], [], []
    for seed in range(1, seeds + 1):
        reached = best = math.inf
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, train.__file__, *words, "--seed", str(seed), "--out", run]
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
                for line in process.stdout:
                    found = re.search(r"validation ([\d.]+) nats.*best ([\d.]+)", line)
                    if found:
                        best = float(found[2])
                        if float(found[1]) <= target:
                            reached = min(reached, time.perf_counter() - began)
            end_if_failed(process.returncode)
            log = read_log(Path(run))
        took.append(time.perf_counter() - began)
        losses.append(best)
        reached_after.append(reached)
        # What the log counts begins with step 0, and what was printed has four digits.
        trained = [x["seconds"] for x in log if round(x["validation_loss"], 4) <= target]
        trained_for.append(min(trained, default=math.inf))
        print(
            f"seed {seed}: {target} after {reached:.1f} s, {trained_for[-1]:.1f} s from step 0; "
            f"{best:.4f} after {took[-1]:.1f} s",
            flush=True,
        )
    spread = statistics.stdev(losses) if seeds > 1 else 0.0
    print(
        f"median {statistics.median(reached_after):.1f} s to {target}, from process start, "
        f"{statistics.median(trained_for):.1f} s from step 0; "
        f"mean best loss {statistics.mean(losses):.4f} ± {spread:.4f} "
        f"after {statistics.median(took):.1f} s"
    )


if __name__ == "__main__":
    main()
