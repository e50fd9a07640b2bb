"""Compare what --dry_run foretells with what training takes.

python bench/dry_run.py --texts book.txt other.txt --presets tiny mini small --max_steps 600
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command_line import Parser, end_if_failed, output_of, whole_number

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")


def foretold(words: list[str]) -> tuple[float, float]:
    """Return the seconds and megabytes that a dry run expects."""
    said = output_of([sys.executable, TRAIN, *words, "--dry_run"])
    hours, minutes, seconds = re.search(
        r"time +about (?:(\d+) h )?(?:(\d+) min ?)?(?:(\d+) s)? in all", said
    ).groups(default="0")
    megabytes = re.search(r"memory +([\d,]+) MB", said)[1].replace(",", "")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds), float(megabytes)


def measured(words: list[str]) -> tuple[float, float]:
    """Train; return the seconds of the whole process, and its peak memory in megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, TRAIN, *words, "--out", folder]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
    end_if_failed(os.waitstatus_to_exitcode(status))
    return took, usage.ru_maxrss * 1024 / 1e6  # in KiB on Linux


def main() -> None:
    """Print a row for each preset and text."""
    parser = Parser(__doc__)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", required=True)
    parser.add_argument("--max_steps", type=whole_number, required=True)
    arguments = parser.parse_args()
    print("| text | preset | seconds foretold | taken | MB foretold | taken |")
    print("|---" * 6 + "|")
    for text in arguments.texts:
        for preset in arguments.presets:
            words = [text, "--preset", preset, "--max_steps", str(arguments.max_steps)]
            (seconds, megabytes), (took, peak) = foretold(words), measured(words)
            print(
                f"| {Path(text).stem} | {preset} "
                f"| {seconds:.0f} | {took:.0f} ({took / seconds:.2f}) "
                f"| {megabytes:.0f} | {peak:.0f} ({peak / megabytes:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
