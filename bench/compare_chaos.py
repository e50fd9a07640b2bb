"""Kill a comparison at random moments, start it again, and see whether it comes to the same table.

python bench/compare_chaos.py book.txt 20 --presets tiny mini --chars 2000000    (Linux, macOS)

Every second kill takes its child along, as when a machine loses power; the others leave it alone.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from command_line import end_if_failed, parse, whole_number

COMPARE = Path(__file__).resolve().parent.parent / "compare.py"
# What a clock decides differs from one comparison to the next.
TIMED = {"characters_per_second", "written_per_second"}


def table(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a comparison, without what a clock decides."""
    with (folder / "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def start(words: list[str], folder: Path, said: int | None) -> subprocess.Popen:
    """Start a comparison as the head of a process group of its own; what it says goes to `said`."""
    command = [sys.executable, str(COMPARE), *words, "--out", str(folder)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=said)


def main() -> None:
    """Run one comparison in peace and another with kills, and compare their tables."""
    asked = parse(__doc__, "arguments of compare.py", text=str, kills=whole_number)
    words = [asked.text, *asked.words]
    peaceful, troubled = Path("out/compare-peaceful"), Path("out/compare-troubled")
    for folder in (peaceful, troubled):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    end_if_failed(start(words, peaceful, None).wait())
    took, draw, killed = time.perf_counter() - began, random.Random(1), 0
    while killed < asked.kills:
        process = start(words, troubled, subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(0, took / 3))
        except subprocess.TimeoutExpired:
            if killed % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            killed += 1
            continue
        # It was finished before that, so begin anew.
        if process.returncode or table(troubled) != table(peaceful):
            sys.exit(f"after {killed} kills, the table is another one")
        shutil.rmtree(troubled)
    if start(words, troubled, subprocess.DEVNULL).wait():
        sys.exit(f"after {killed} kills, the comparison failed")
    same = table(troubled) == table(peaceful)
    print(
        f"{killed} kills in comparisons of {took:.0f} s: {'the same' if same else 'ANOTHER'} table"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
