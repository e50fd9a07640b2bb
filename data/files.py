"""From paths to files: which ones are read, how they are opened, and what they are joined to."""

import bz2
import contextlib
import difflib
import fnmatch
import functools
import gzip
import io
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data.catalogue import CATALOGUE, TEXTS, fetch
from data.encoding import OTHER_FORMATS, UTF8, DamagedError, decode, detect_encoding

# A file with a zero byte among its first 8,192 is taken for binary: text has none.
BINARY_PROBE = 8192
BLOCK = 2**18
# Reading more bytes than this takes long enough to show how far it is.
SHOWN_BYTES = 2**26
# Folders with files that were installed or made, not written.
VENDORED = {"node_modules", "__pycache__", "site-packages", "venv", "vendor", "build", "dist"}
STANDARD_INPUT = "-"
LONGEST_NAME = 120  # bytes
COMPRESSED = (".gz", ".bz2", ".xz")
# What reads a file that begins like this.
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
ZSTANDARD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Documents:
    """Files that together are a text, each with its encoding."""

    # What comes only once, from a pipe, is held as bytes.
    files: tuple[tuple[str | bytes, str], ...]
    # Files in folders that are not text, and those whose encoding is not known.
    n_binary: int = 0
    unknown: tuple[str, ...] = ()

    def blocks(self, line_ends: set[str], doing: str) -> Iterator[str]:
        """Yield the text in blocks, documents joined by a blank line."""
        sizes = [len(f) if isinstance(f, bytes) else os.path.getsize(f) for f, _ in self.files]
        total, last = sum(sizes), ""
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=doing,
            leave=False,
            disable=None if total > SHOWN_BYTES else True,
        ) as bar:
            for file, encoding in self.files:
                between = last and ("\n" if last == "\n" else "\n\n")
                with _opened(file) as opened:
                    for block in decode(_blocks(opened, bar), encoding, _shown(file), line_ends):
                        if block:
                            yield between + block
                            between, last = "", block[-1]
        if len(self.files) > 1 and last not in ("", "\n"):
            yield "\n"


def find_files(paths: Sequence[str], glob: str | None) -> list[tuple[str | bytes, bool]]:
    """Find the files that paths name; without any, those of Python's own library.

    Each comes with whether it was named itself: in a folder there may be anything, except that
    hidden, vendored and trained files are left out.
    """
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        if not (sources := sorted(library.glob("*.py"))):
            raise FileNotFoundError(
                f"Python's library has no source files in {library}; name a text file to train on"
            )
        return [(str(source), True) for source in sources]
    found: list[tuple[str | bytes, bool]] = []
    for path in paths:
        if path in CATALOGUE and not os.path.exists(path):
            path = str(fetch(path))
        if not os.path.isdir(path):
            found.append((_held(path), True))
        elif inside := _files_in(Path(path), glob):
            found += [(str(file), False) for file in inside]
        else:
            matching = f" that matches {glob}" if glob else ""
            raise FileNotFoundError(
                f"there is no text file{matching} in the folder {path} (what is hidden, runs, "
                "and folders such as venv and build are left out)"
            )
    return found


def look_into(files: Sequence[tuple[str | bytes, bool]], encoding: str) -> Documents:
    """Find out in which encoding each file is, and leave out what is no text in a folder.

    There, the encoding that is asked for is that of the files that do not show theirs.
    """
    found, unknown, n_binary, problem = [], [], 0, None
    for file, named in files:
        try:
            if named:
                found.append((file, _encoding(file, encoding)))
            elif _is_binary(file):
                n_binary += 1
            else:
                found.append((file, _encoding_in_folder(file, encoding)))
        except ValueError as error:
            if named:
                raise
            problem = error
            unknown.append(file)
    if not found and problem:
        raise problem
    if not found:
        folders = sorted({os.path.dirname(file) for file, _ in files})
        raise FileNotFoundError(f"there is no text file in the folder {' or '.join(folders)}")
    return Documents(tuple(found), n_binary, tuple(unknown))


def name_of(paths: Sequence[str]) -> str:
    """Return a short name for a text, for the folder of its run."""
    if not paths:
        return "python"
    if paths[0] == STANDARD_INPUT:
        name = "stdin"
    else:
        # abspath names the folder itself where the path is "." or "..".
        path = Path(os.path.abspath(paths[0]))
        name = (path.with_suffix("") if path.suffix in COMPRESSED else path).stem
        # Names of files are made of it: those may have 255 bytes, and should be UTF-8.
        name = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore") or "text"
    return name if len(paths) == 1 else f"{name}-and-{len(paths) - 1}-more"


def _shown(file: str | bytes) -> str:
    return "standard input" if isinstance(file, bytes) else file


def _held(path: str) -> str | bytes:
    """Return a path, or all that comes from standard input or a pipe, which come only once."""
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError("standard input is closed; name a text file instead of -")
        return sys.stdin.buffer.read()
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or folder {path!r}{_similar(path)}")
    if os.path.isfile(path):
        return path
    if not Path(path).is_fifo():
        raise ValueError(f"{path} is a device, not a file with a text")
    # A pipe that nobody writes to is empty, and is not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as pipe:
        return pipe.read()


def _similar(path: str) -> str:
    """Return the text that was probably meant, as an addition to a sentence, or nothing."""
    folder, name = os.path.split(path)
    known = [] if folder else list(CATALOGUE)
    with contextlib.suppress(OSError, ValueError):
        known += os.listdir(folder or ".")
    alike = {other.lower(): other for other in known if other != name}
    # By difflib's own cutoff, names would be alike that share no more than .txt.
    nearest = difflib.get_close_matches(name.lower(), alike, n=1, cutoff=0.75)
    return f" (did you mean {os.path.join(folder, alike[nearest[0]])!r}?)" if nearest else ""


def _encoding(file: str | bytes, encoding: str) -> str:
    """Return the encoding of a file; raises ValueError if all of it cannot be read in that."""
    with _opened(file) as opened:
        if encoding == "auto":
            encoding = detect_encoding(_blocks(opened), _shown(file))
            if encoding in UTF8:
                return encoding  # to find that out, all of it was read
            opened.seek(0)
        for _ in decode(_blocks(opened), encoding, _shown(file), set()):
            pass
    return encoding


def _encoding_in_folder(path: str, encoding: str) -> str:
    """Return the encoding that a file shows, or else the one given, if all can be read in that."""
    try:
        return _encoding(path, "auto")
    except DamagedError:
        raise  # most code pages would read it, as nonsense
    except ValueError:
        if encoding == "auto":
            raise
        return _encoding(path, encoding)


@contextlib.contextmanager
def _opened(path: str | bytes) -> Iterator[BinaryIO]:
    """Open a file for reading from any place in it, whatever it is and however it is compressed."""
    with contextlib.ExitStack() as files:
        try:
            if isinstance(path, bytes):
                file = files.enter_context(io.BytesIO(path))
            else:
                file = files.enter_context(open(path, "rb"))
            beginning = file.read(max(map(len, OPENERS)))
            file.seek(0)
            if beginning.startswith(ZSTANDARD):
                raise ValueError(
                    f"{_shown(path)} is compressed with zstd; only gzip, bzip2 and xz are read, so "
                    "decompress it with zstd -d first"
                )
            for magic, opener in OPENERS.items():
                if beginning.startswith(magic):
                    file = files.enter_context(opener(file))
            yield file
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # What the system says has a number, and a missing file is not a damaged one.
            if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
                raise
            raise ValueError(f"{_shown(path)} cannot be decompressed: {error}") from None


def _blocks(file: BinaryIO, bar: tqdm | None = None) -> Iterator[bytes]:
    for block in iter(functools.partial(file.read, BLOCK), b""):
        if bar is not None:
            bar.update(len(block))
        yield block


def _files_in(folder: Path, glob: str | None) -> list[Path]:
    """Find the files below a folder, not hidden or vendored ones or what training wrote."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_leave_out):
        folders[:] = [
            f
            for f in folders
            if not f.startswith(".")
            and f not in VENDORED
            and Path(place, f).resolve() != TEXTS.parent.resolve()
        ]
        of_a_run = any(name.endswith(".safetensors") for name in files)
        if of_a_run or Path(place).resolve() == TEXTS.resolve():
            continue
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(
        path
        for path in found
        if path.is_file() and (glob is None or fnmatch.fnmatch(path.name, glob))
    )


def _leave_out(error: OSError) -> None:
    tqdm.write(f"warning: {error.filename} is left out: {error.strerror}", file=sys.stderr)


def _is_binary(path: str) -> bool:
    with _opened(path) as file:
        probe = file.read(BINARY_PROBE)
    if probe.startswith(tuple(OTHER_FORMATS)):
        return True
    # UTF-16 and UTF-32 have zero bytes, too; with a byte order mark they are known.
    return b"\0" in probe and not probe.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
