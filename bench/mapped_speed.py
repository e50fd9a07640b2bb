"""Measure whether training on a text that is mapped from a file is slower than on one in memory.

python bench/mapped_speed.py shakespeare.txt 1000 --preset mini

The text is repeated until it has so many megabytes; after that, settings of train.py.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import parse, text_in_utf8, whole_number
from encode import write_large

import train
from config.script import bad_input_exits

ROUNDS, SECONDS = 9, 2.0


def main() -> None:
    """Time steps on both in turn, and print the ratio of the medians."""
    asked = parse(__doc__, "settings of train.py", text=text_in_utf8, megabytes=whole_number)
    with bad_input_exits("mapped_speed.py"), tempfile.TemporaryDirectory() as folder:
        words = train.command_line().parse(["large.txt", *asked.words])
        os.chdir(folder)
        write_large(asked.text, 1_000_000 * asked.megabytes, Path("large.txt"))
        run = train.begin(*words)
        held = replace(run, training_ids=run.training_ids.clone())
        steps = {"mapped": train.step_function(run), "in memory": train.step_function(held)}
        milliseconds = {name: [] for name in steps}
        step = 0
        for round_number in range(1 + ROUNDS):
            for name, take_step in steps.items():
                began, taken = time.perf_counter(), 0
                while (spent := time.perf_counter() - began) < SECONDS:
                    take_step(step, 10**9)
                    step, taken = step + 1, taken + 1
                if round_number:  # the first one warms up
                    milliseconds[name].append(1e3 * spent / taken)
        os.chdir("/")
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    print(", ".join(f"{name} {value:.2f} ms a step" for name, value in medians.items()))
    print(f"mapped has {medians['in memory'] / medians['mapped']:.1%} of the speed in memory")


if __name__ == "__main__":
    main()
