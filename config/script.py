"""What every script does at its edges: UTF-8 goes out, bad input and Ctrl-C end in good order."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

NO_MEMORY = "allocate memory|out of memory|Storage size"


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run the main function of a script and exit with its code, or that of what stopped it."""
    for stream in (sys.stdout, sys.stderr):
        # Any character can be printed on any terminal or pipe, and lines are not held back.
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has what it wants; nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


@contextlib.contextmanager
def bad_input_exits(program: str) -> Iterator[None]:
    """Turn a ValueError or OSError raised inside into its sentence on stderr and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename or 'the system says'}: {error.strerror}"
        if isinstance(error, MemoryError | RuntimeError):
            # What torch cannot allocate is a RuntimeError among others.
            if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, sentence):
                raise
            sentence = "there is not enough memory for a model or batch of this size"
        print(f"{program}: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
