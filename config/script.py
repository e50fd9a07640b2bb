"""What every script does at its edges: UTF-8 goes out, bad input and signals end in good order."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

from config.hardware import DoesNotFitError, ran_out_of_memory

# Ctrl-C, what systems and schedulers send before they kill, and the end of a remote session.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


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


# Control characters, except line break and tab, and the pictures that Unicode has for them.
PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def harmless(text: str) -> str:
    """Return a text as a terminal can show it: control characters, which command it, as pictures.

    What a stranger's model writes might otherwise move the cursor or fill the clipboard.
    """
    return text.translate(PICTURES)


@contextlib.contextmanager
def bad_input_exits(program: str) -> Iterator[None]:
    """Turn a ValueError or OSError raised inside into its sentence on stderr and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = describe_os_error(error) if isinstance(error, OSError) else str(error)
        if ran_out_of_memory(error) and not isinstance(error, DoesNotFitError):
            sentence = "there is not enough memory for a model or batch of this size"
        elif isinstance(error, RuntimeError):
            raise
        print(f"{program}: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def describe_os_error(error: OSError) -> str:
    """Say what could not be read or written, and why, without the error's number."""
    return (
        f"{error.filename or 'the system says'}: {error.strerror}" if error.strerror else str(error)
    )


class StopRequest:
    """While it is entered, Ctrl-C or a like signal asks for a stop; a second one stops at once.

    `made` says whether there was one, and `exit_code` what a process that was stopped by it
    returns.
    """

    made = False
    exit_code = 0

    def __enter__(self) -> Self:
        # A signal that is ignored, as hanging up is below nohup, stays ignored.
        self._previous = {
            number: signal.signal(number, self._note)
            for number in STOP_SIGNALS
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.made, self.exit_code = True, 128 + number
        self.__exit__()
        if number not in (signal.SIGINT, signal.SIGTERM):
            # The terminal is gone, and writing to it would fail before the run is saved.
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        # A signal may arrive in the middle of a print, which print does not bear.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
