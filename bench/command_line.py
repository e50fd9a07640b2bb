"""What the measurements share: a command line that explains itself, and processes that may fail."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser that shows all of a script's docstring, and refuses in one sentence."""

    def __init__(self, about: str):
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse(about: str, rest: str = "", **kinds: Callable[[str], Any]) -> argparse.Namespace:
    """Return what a measurement was called with: a value of each kind, and the words after them.

    `rest` says what these words are for; without it, there must be none.
    """
    parser = Parser(about)
    for name, kind in kinds.items():
        parser.add_argument(name, type=kind)
    if rest:
        words = parser.add_argument("words", nargs=argparse.REMAINDER, help=rest)
        words.required = False  # Python 3.11 says so when others are missing
    asked = parser.parse_args()
    if rest and {"-h", "--help"} & set(asked.words):
        parser.print_help()
        parser.exit()
    return asked


def whole_number(word: str) -> int:
    """Return a number, at least 1."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number of at least 1")
    return int(word)


def text_in_utf8(path: str) -> str:
    """Return what a file holds."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"'{path}' cannot be read as UTF-8: {error}") from None
    if not text:
        raise argparse.ArgumentTypeError(f"'{path}' is empty")
    return text


def output_of(command: list[str], **options: Any) -> str:
    """Return what a Python script prints; if it fails, this process ends, too."""
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", **options)
    end_if_failed(done.returncode)
    return done.stdout


def end_if_failed(code: int) -> None:
    """Exit as a process did that failed. It has said why, unless it was killed."""
    if code < 0:
        sys.exit(f"a process was killed by signal {-code}; perhaps memory ran out")
    if code:
        sys.exit(code)
