"""Measure how fast a large text becomes ids, and how much memory that takes; Linux.

python bench/encode.py shakespeare.txt 1000    (text, size in megabytes: it is repeated)

Beside it: a loop over a dictionary of the characters, on the text as it is.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from command_line import output_of, parse, text_in_utf8, whole_number

ROOT = Path(__file__).resolve().parent.parent

START = "import torch, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
ENCODE = f"""
import sys, time, resource
sys.path.insert(0, {str(ROOT)!r})
import torch
from data import TextConfig, Vocabulary, read_text
torch.set_num_threads(1)
began = time.perf_counter()
text = read_text(sys.argv[1:], TextConfig())
ids = text.ids(Vocabulary.of_counts(text.counts))
took = time.perf_counter() - began
print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_large(text: str, size: int, path: Path) -> None:
    """Write a text again and again, each time with a number, until it has so many bytes."""
    with path.open("w", encoding="utf-8") as large:
        for number in range(-(-size // len(text.encode()))):
            large.write(f"\n{number}\n{text}")
        # Otherwise the system would still be writing it while it is read.
        large.flush()
        os.fsync(large.fileno())


def numbers(program: str, *words: str) -> list[float]:
    """Run a Python program and return the numbers that it prints."""
    printed = output_of([sys.executable, "-c", program, *words])
    return [float(number) for number in printed.split()]


def plain_loop(text: str) -> float:
    """Return the megabytes a second at which a dictionary encodes a text."""
    began = time.perf_counter()
    id_of = {character: i for i, character in enumerate(sorted(set(text)))}
    [id_of[character] for character in text]
    return len(text.encode()) / 1e6 / (time.perf_counter() - began)


def main() -> None:
    """Encode a large text twice, and print speed and memory."""
    asked = parse(__doc__, text=text_in_utf8, megabytes=whole_number)
    (before,) = numbers(START)
    plain = plain_loop(asked.text)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_large(asked.text, 1_000_000 * asked.megabytes, Path("large.txt"))
        megabytes = Path("large.txt").stat().st_size / 1e6
        took, peak = numbers(ENCODE, "large.txt")
        again, _ = numbers(ENCODE, "large.txt")
        os.chdir(ROOT)
    print(
        f"{megabytes:,.0f} MB: {megabytes / took:.0f} MB/s, with {(peak - before) / 1e6:.0f} MB "
        f"above `import torch`; found again in {again:.2f} s; a dictionary {plain:.0f} MB/s, "
        f"{megabytes / took / plain:.1f} times"
    )


if __name__ == "__main__":
    main()
