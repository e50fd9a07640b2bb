"""Train presets, each for some minutes, and print a row of the README's table for each.

python bench/presets.py book.txt tiny:1 small:2
"""

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from checkpoint import LAST, load_checkpoint, read_log


def main() -> None:
    """Run train.py once for each `preset:minutes`, one after the other."""
    text, *jobs = sys.argv[1:]
    print("| preset | parameters | minutes | steps | characters/s | times read | nats | bits |")
    print("|---|---|---|---|---|---|---|---|")
    for job in jobs:
        preset, minutes = job.split(":")
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, train.__file__, text, "--preset", preset, "--out", run]
            began = time.perf_counter()
            subprocess.run([*command, "--minutes", minutes], check=True, stdout=subprocess.DEVNULL)
            took = (time.perf_counter() - began) / 60
            last = load_checkpoint(Path(run, LAST))
            seconds = read_log(Path(run))[-1]["seconds"]
        steps, best = last.progress.step, last.progress.best_loss
        batch_size = last.settings["train"]["batch_size"]
        characters = steps * batch_size * last.model.config.block_size
        parameters, _ = last.model.count_parameters()
        print(
            f"| `{preset}` | {parameters:,} | {took:.2f} | {steps:,} "
            f"| {characters / seconds:,.0f} "
            f"| {characters / (0.9 * last.text['characters']):.2g} "
            f"| {best:.3f} | {best / math.log(2):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
