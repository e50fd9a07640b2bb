"""From paths to one text: which files are read, and how they become one string."""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A file with a zero byte among its first 8,192 is taken for binary: text has none.
BINARY_PROBE = 8192


@dataclass(frozen=True)
class Text:
    """What was read: a short name for it, all its characters, and where they came from."""

    name: str
    characters: str
    n_files: int
    n_skipped: int = 0

    @functools.cached_property
    def sha256(self) -> str:
        """The fingerprint by which a resumed run knows its text again."""
        return hashlib.sha256(self.characters.encode()).hexdigest()


def read_text(paths: Sequence[str]) -> Text:
    """Read files and folders into one text; without any, the source of Python's own library.

    Documents are joined by a blank line. In a folder, hidden and binary files are left out.
    """
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        files = sorted(library.glob("*.py"))
        if not files:
            raise FileNotFoundError(
                f"Python's library has no source files in {library}; name a text file to train on"
            )
        return Text("python", _join(files), len(files))
    files, n_skipped = [], 0
    for path in map(Path, paths):
        if path.is_dir():
            found = _files_in(path)
            text_files = [file for file in found if not _is_binary(file)]
            if not text_files:
                raise FileNotFoundError(f"there is no text file in the folder {path}")
            files += text_files
            n_skipped += len(found) - len(text_files)
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    characters = _join(files)
    if not characters:
        raise ValueError(f"{' and '.join(paths)} is empty; a text needs characters to learn from")
    # abspath names the folder itself where the path is "." or "..".
    name = Path(os.path.abspath(paths[0])).stem
    if len(paths) > 1:
        name += f"-and-{len(paths) - 1}-more"
    return Text(name, characters, len(files), n_skipped)


def read_file(path: str | Path) -> str:
    """Read one UTF-8 file; a byte order mark is no character, and every line ends in \\n."""
    data = Path(path).read_bytes()
    try:
        characters = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if _is_binary(Path(path)):
            raise ValueError(f"{path} is not a text in UTF-8, but binary or UTF-16") from None
        raise ValueError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at position {error.start} "
            f"({error.reason}); save it as UTF-8 and try again"
        ) from None
    return characters.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _join(files: Sequence[Path]) -> str:
    documents = [read_file(file) for file in files]
    if len(documents) == 1:
        return documents[0]
    return "\n".join(
        document if document.endswith("\n") else document + "\n"
        for document in documents
        if document
    )


def _files_in(folder: Path) -> list[Path]:
    """Find the files below a folder, except hidden ones and those of training runs."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(path.parent.glob("*.safetensors"))
    )


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(BINARY_PROBE)
