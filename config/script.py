"""What every script does at its edges: UTF-8 goes out, bad input and signals end in good order."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self, TextIO

from config.hardware import DoesNotFitError, ran_out_of_memory

# Ctrl-C, what systems and schedulers send before they kill, and the end of a remote session.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
INTERRUPTED = 128 + signal.SIGINT


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run the main function of a script and exit with its code, or that of what stopped it."""
    for number in STOP_SIGNALS:
        # By default, all but Ctrl-C end Python at once, and what is half-written stays behind.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_in_order)
    for name in ("stdout", "stderr"):
        # Whoever starts it may have closed them.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, because it stays open
    for stream in (sys.stdout, sys.stderr):
        # Any character can be printed on any terminal or pipe, and lines are not held back.
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        code = main()
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = 141
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Its reader, such as `head`, has what it wants, or the terminal is gone: nothing more
            # can be said. Trying again at the very end, Python would change an exit code to 120.
            if code:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code == INTERRUPTED:
        # Other threads may still compute parts of a batch, and sys.exit would wait for them.
        os._exit(code)
    sys.exit(code)


def _exit_in_order(number: int, _: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # another one would break off what this one sets off
    raise SystemExit(128 + number)


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
    """Turn bad input and lack of memory into a sentence on stderr and exit code 2.

    Bad input is a ValueError or an OSError raised inside.
    """
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
    """While it is entered, Ctrl-C or a like signal asks for a stop; a second Ctrl-C stops at once.

    `made` says whether there was one, and `exit_code` what a process that was stopped by it
    returns.
    """

    made = False
    exit_code = 0

    def __enter__(self) -> Self:
        self._previous: dict[int, Any] = {}
        for number in STOP_SIGNALS:
            # What is ignored stays ignored: hanging up below nohup, Ctrl-C in the background.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.made, self.exit_code = True, 128 + number
        # The other signals may come twice: a closed terminal sends one, and so does its shell.
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        if number == getattr(signal, "SIGHUP", None):
            # The second one may come as late as when Python ends, so it stays ignored.
            signal.signal(number, signal.SIG_IGN)
            self._previous.pop(number, None)
        # A signal may arrive in the middle of a print, which print does not bear.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once\n")


class Unfailing:
    """A stream that drops what cannot be written, to a full disk or to a terminal that is gone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write as far as possible; a pipe that nobody reads is still an error."""
        try:
            self.stream.write(text)
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def flush(self) -> None:
        """Do as `write` does."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass
