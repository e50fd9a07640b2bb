"""What the measurements share: a command line that explains itself, and processes that may fail."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse(about: str, words: str = "", **kinds: Callable[[str], Any]) -> argparse.Namespace:
    """Return what a measurement was called with: a value of each kind, and then any `words`.

    What they are for is said by --help, below what the measurement is about. Bad input exits
    with code 2 and a sentence.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind in kinds.items():
        parser.add_argument(name, type=kind)
    if words:
        parser.add_argument("words", nargs=argparse.REMAINDER, help=words)
    return parser.parse_args()


def file(word: str) -> str:
    """Return the path of a file that is there."""
    if not Path(word).is_file():
        raise argparse.ArgumentTypeError(f"there is no file '{word}'")
    return word


def count(word: str) -> int:
    """Return a whole number, at least 1."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number of at least 1")
    return int(word)


def run(command: list[str], **options: Any) -> str:
    """Return what a command prints; if it fails, it has said why, and this process ends, too."""
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", **options)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout
