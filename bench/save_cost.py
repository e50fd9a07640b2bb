"""Measure what saving a run costs beside training it.

python bench/save_cost.py book.txt --preset small --max_steps 500    (arguments of train.py)
"""

import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import parse

import train

seconds: Counter[str] = Counter()


def timed(name: str, function: Callable) -> Callable:
    """Return a function that adds the time it takes to `seconds`."""

    def call(*arguments: object) -> object:
        began = time.perf_counter()
        result = function(*arguments)
        seconds[name] += time.perf_counter() - began
        return result

    return call


def main() -> None:
    """Train, and print how long the parts took."""
    asked = parse(__doc__, "settings of train.py", text=str)
    for name in ("train", "evaluate", "write_sample", "keep"):
        setattr(train, name, timed(name, getattr(train, name)))
    with tempfile.TemporaryDirectory() as run, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            train.main([asked.text, *asked.words, "--out", run])
        sizes = {path.name: path.stat().st_size / 1e6 for path in Path(run).iterdir()}
    training = seconds["train"] - seconds["evaluate"] - seconds["write_sample"] - seconds["keep"]
    print(", ".join(f"{name} {size:.1f} MB" for name, size in sorted(sizes.items())))
    print(
        f"{training:.1f} s of training, {seconds['evaluate'] + seconds['write_sample']:.1f} s of "
        f"evaluation, {seconds['keep']:.2f} s of saving: {seconds['keep'] / training:.2%}"
    )


if __name__ == "__main__":
    main()
