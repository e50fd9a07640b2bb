"""What every script does at its edges: text goes out as UTF-8, bad input gets one sentence."""

import contextlib
import sys
from collections.abc import Iterator


def use_utf8() -> None:
    """Print any character on any terminal or pipe: what it cannot show becomes a '?'."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)


@contextlib.contextmanager
def bad_input_exits(program: str) -> Iterator[None]:
    """Turn a ValueError or OSError raised inside into its sentence on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}"
        print(f"{program}: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
