"""From paths to one text: which files are read, and how they become one string."""

import bz2
import contextlib
import dataclasses
import fnmatch
import functools
import gzip
import hashlib
import importlib
import io
import lzma
import math
import os
import stat
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, BinaryIO

from data.catalogue import CATALOGUE, fetch
from data.encoding import check_encoding, decode, detect_encoding

# A file with a zero byte among its first 8,192 is taken for binary: text has none.
BINARY_PROBE = 8192
BLOCK = 2**20
# Folders with files that were installed or made, not written.
VENDORED = {"node_modules", "__pycache__", "site-packages", "venv", "vendor", "build", "dist"}
STANDARD_INPUT = "-"

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
GZIP, BZIP2, XZ, ZSTANDARD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class TextConfig:
    """How the text is read."""

    encoding: Annotated[str, "encoding of its files, such as gb18030 or cp1252"] = "auto"
    glob: Annotated[str | None, 'which files of a folder, such as "*.md"; none: all texts'] = None
    val_fraction: Annotated[float, "share of the text, at its end, to validate on"] = 0.1
    val_text: Annotated[str | None, "another text to validate on; none: the end of this one"] = None
    min_count: Annotated[int, "characters that come less often become one, the unknown"] = 1

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must be between 0 and 1")
        if self.min_count < 1:
            raise ValueError(f"min_count is {self.min_count}; it must be at least 1")
        if self.encoding != "auto":
            check_encoding(self.encoding)


@dataclass(frozen=True)
class Text:
    """What was read: a short name for it, all its characters, and where they came from."""

    name: str
    characters: str
    # How many of them are to train on; the others, which come last, are to validate on.
    n_training: int
    encodings: tuple[str, ...]
    # How lines ended; here all of them end in \n.
    line_ends: tuple[str, ...]
    n_files: int
    # Files in folders that are not text, and those whose encoding is not known.
    n_binary: int = 0
    unknown: tuple[str, ...] = ()

    @functools.cached_property
    def sha256(self) -> str:
        """The fingerprint by which a resumed run knows its text again."""
        return hashlib.sha256(self.characters.encode("utf-8", "surrogatepass")).hexdigest()


def read_text(paths: Sequence[str], config: TextConfig) -> Text:
    """Read files and folders into one text; without any, the source of Python's own library.

    Documents are joined by a blank line. In a folder, files that are no text are left out, and so
    are hidden, vendored and trained ones.
    """
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        files = sorted(library.glob("*.py"))
        if not files:
            raise FileNotFoundError(
                f"Python's library has no source files in {library}; name a text file to train on"
            )
        characters, n_training = _with_validation(_join(map(read_file, files)), config)
        return Text("python", characters, n_training, ("utf_8",), ("\n",), len(files))
    documents, encodings, line_ends, unknown, n_binary = [], set(), set(), [], 0
    for path in paths:
        if path in CATALOGUE and not os.path.exists(path):
            path = str(fetch(path))
        if not Path(path).is_dir():
            sources = [path]
        elif not (sources := _files_in(Path(path), config.glob)):
            matching = f" that matches {config.glob}" if config.glob else ""
            raise FileNotFoundError(f"there is no text file{matching} in the folder {path}")
        for source in sources:
            try:
                if source is not path and _is_binary(source):
                    n_binary += 1
                    continue
                document, encoding = _read(source, config.encoding, line_ends)
            except ValueError:
                # What was named has to be read; in a folder there may be anything.
                if source is path:
                    raise
                unknown.append(str(source))
                continue
            documents.append(document)
            encodings.add(encoding)
    characters = _join(documents)
    if not documents:
        raise FileNotFoundError(f"there is no text file in the folder {' or '.join(paths)}")
    if not characters:
        raise ValueError(f"{' and '.join(paths)} is empty; a text needs characters to learn from")
    characters, n_training = _with_validation(characters, config)
    return Text(
        _name(paths),
        characters,
        n_training,
        tuple(sorted(encodings)),
        tuple(sorted(line_ends)),
        len(documents),
        n_binary,
        tuple(unknown),
    )


def _with_validation(characters: str, config: TextConfig) -> tuple[str, int]:
    """Return all characters, to train and to validate on, and how many of them to train on."""
    if config.val_text is not None:
        validation = read_text([config.val_text], dataclasses.replace(config, val_text=None))
        return characters + validation.characters, len(characters)
    # In fractions of integers, 0.1 is a tenth.
    return characters, math.floor(len(characters) * (1 - Fraction(str(config.val_fraction))))


def read_file(path: str | Path) -> str:
    """Read one text file, in UTF-8 unless it shows that it is in another encoding."""
    return _read(path, "auto", set())[0]


def _name(paths: Sequence[str]) -> str:
    """Return a short name for a text, for the folder of its run."""
    if paths[0] == STANDARD_INPUT:
        name = "stdin"
    else:
        # abspath names the folder itself where the path is "." or "..".
        path = Path(os.path.abspath(paths[0]))
        name = (path.with_suffix("") if path.suffix in COMPRESSED else path).stem or "text"
    return name if len(paths) == 1 else f"{name}-and-{len(paths) - 1}-more"


def _read(path: str | Path, encoding: str, line_ends: set[str]) -> tuple[str, str]:
    """Return the characters of one file and its encoding, and add its line ends to a set."""
    name = "standard input" if path == STANDARD_INPUT else str(path)
    with _opened(path) as file:
        if encoding == "auto":
            encoding = detect_encoding(_blocks(file), name)
            file.seek(0)
        return "".join(decode(_blocks(file), encoding, name, line_ends)), encoding


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for reading from any place in it, whatever it is and however it is compressed."""
    with contextlib.ExitStack() as files:
        try:
            file = files.enter_context(_open(path))
            beginning = file.read(len(XZ))
            file.seek(0)
            if beginning.startswith(GZIP):
                file = files.enter_context(gzip.GzipFile(fileobj=file))
            elif beginning.startswith(BZIP2):
                file = files.enter_context(bz2.BZ2File(file))
            elif beginning.startswith(XZ):
                file = files.enter_context(lzma.LZMAFile(file))
            elif beginning.startswith(ZSTANDARD):
                zstd = importlib.import_module("compression.zstd")
                file = files.enter_context(zstd.ZstdFile(file))
            yield file
        except ImportError:
            raise ValueError(
                f"{path} is compressed with zstd, which Python can read from 3.14 on; "
                f"decompress it first: zstd -d {path}"
            ) from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # What the system says has a number, and a missing file is not a damaged one.
            if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
                raise
            raise ValueError(f"{path} cannot be decompressed: {error}") from None


def _open(path: str | Path) -> BinaryIO:
    """Open a file as it is; standard input and pipes are read whole, as they come only once."""
    if path == STANDARD_INPUT:
        return io.BytesIO(sys.stdin.buffer.read())
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    kind = os.stat(path).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) or stat.S_ISSOCK(kind):
        raise ValueError(f"{path} is a device, not a file with a text")
    if not stat.S_ISFIFO(kind):
        return open(path, "rb")
    # A pipe that nobody writes to is empty, and is not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as pipe:
        return io.BytesIO(pipe.read())


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    return iter(functools.partial(file.read, BLOCK), b"")


def _join(documents: Iterable[str]) -> str:
    documents = list(documents)
    if len(documents) == 1:
        return documents[0]
    return "\n".join(
        document if document.endswith("\n") else document + "\n"
        for document in documents
        if document
    )


def _files_in(folder: Path, glob: str | None) -> list[Path]:
    """Find the files below a folder, except hidden and vendored ones and those of training runs."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in VENDORED]
        if any(name.endswith(".safetensors") for name in files):
            continue
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(
        path
        for path in found
        if path.is_file() and (glob is None or fnmatch.fnmatch(path.name, glob))
    )


def _is_binary(path: Path) -> bool:
    with _opened(path) as file:
        probe = file.read(BINARY_PROBE)
    # UTF-16 and UTF-32 have zero bytes, too; with a byte order mark they are known.
    return b"\0" in probe and not probe.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
