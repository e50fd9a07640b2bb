"""One text out of files: what is in it, and its ids, in memory or, if it is long, in a file."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import mmap
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from data.catalogue import TEXTS, in_place_of
from data.encoding import check_encoding
from data.files import STANDARD_INPUT, Documents, find_files, look_into, name_of
from data.vocabulary import Vocabulary, count_characters

# The characters of a longer text are not held in memory, but read again when they are needed.
HELD_CHARACTERS = 2**24


@dataclass(frozen=True)
class TextConfig:
    """How the text is read."""

    encoding: Annotated[str, "encoding of its files, such as cp1252; auto: found out"] = "auto"
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
    """What was read: a short name for it, what is in it, and where it comes from."""

    name: str
    # How often each character comes.
    counts: dict[str, int]
    # How many of them are to train on; the others, which come last, are to validate on.
    n_training: int
    # The fingerprint by which a resumed run knows its text again.
    sha256: str
    # How lines ended; here all of them end in \n.
    line_ends: tuple[str, ...]
    # One part, or one to train and one to validate on.
    parts: tuple[Documents, ...]
    # All files that were looked at, each with its size and when it was last changed.
    watched: tuple[tuple[str, int, int], ...]
    # All its characters, or the file where its ids are if it is long.
    held: str | None
    ids_file: Path | None = None

    @property
    def n_characters(self) -> int:
        """How many characters the text has."""
        return sum(self.counts.values())

    @property
    def encodings(self) -> list[str]:
        """The encodings of its files."""
        return sorted({encoding for part in self.parts for _, encoding in part.files})

    def blocks(self, doing: str = "reading") -> Iterator[str]:
        """Yield its characters in blocks."""
        if self.held is not None:
            yield self.held
            return
        for part in self.parts:
            yield from part.blocks(set(), doing)

    def ids(self, vocabulary: Vocabulary, copied: bool = False) -> Tensor:
        """Return the ids (N,) of its N characters, mapped from a file if the text is long.

        They are not to be written to. `copied` says that all of them are going to be read at once.
        Raises ValueError if the text has changed since it was looked through.
        """
        if self.held is not None:
            return vocabulary.encode(self.held, unknown=True)
        kind = vocabulary.id_type
        if not self.ids_file.exists() or self.ids_file.stat().st_size != (
            self.n_characters * kind.itemsize
        ):
            self._write_ids(vocabulary)
        # A shared mapping takes no memory that the system could not take back.
        with self.ids_file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mapped, "madvise") and not copied:  # Windows has none
            # Windows from all over it are read: what is next to them would be read for nothing.
            mapped.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():
            # torch warns that it cannot be written to.
            warnings.simplefilter("ignore", UserWarning)
            return torch.frombuffer(mapped, dtype=kind)

    def _write_ids(self, vocabulary: Vocabulary) -> None:
        with in_place_of(self.ids_file) as temporary:
            with temporary.open("wb") as file, contextlib.suppress(ValueError):
                for block in self.blocks("encoding"):
                    file.write(vocabulary.encode(block, unknown=True).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            whole = temporary.stat().st_size == self.n_characters * vocabulary.id_type.itemsize
            if not whole or _watch(path for path, _, _ in self.watched) != self.watched:
                raise ValueError(f"{self.name} has changed while it was read; try again")


def read_text(paths: Sequence[str], config: TextConfig) -> Text:
    """Read files and folders into one text; without any, the source of Python's own library.

    What was found out about a long text is kept in a file, and holds for as long as its files
    have the same sizes and times of change.
    """
    name, files = name_of(paths), find_files(paths, config.glob)
    validation_files = []
    if config.val_text is not None:
        validation_files = find_files([config.val_text], config.glob)
    paths_found = [file for file, _ in [*files, *validation_files]]
    kept, watched = _kept(name, paths_found, config), _watch(paths_found)
    if known := _recall(name, kept, watched):
        return known
    parts = [look_into(files, config.encoding)]
    if validation_files:
        parts.append(look_into(validation_files, config.encoding))
    # What came through a pipe is in memory already.
    most_held = math.inf if kept is None else HELD_CHARACTERS
    text = _look_through(name, parts, watched, config, most_held)
    if not text.counts:
        names = ["standard input" if path == STANDARD_INPUT else path for path in paths]
        raise ValueError(f"{' and '.join(names)} is empty; name a text with characters in it")
    if text.held is None:
        text = dataclasses.replace(text, ids_file=_ids_file(kept, text.sha256))
        _remember(text, kept)
    return text


def _look_through(
    name: str,
    parts: Sequence[Documents],
    watched: tuple[tuple[str, int, int], ...],
    config: TextConfig,
    most_held: float,
) -> Text:
    """Read a text, which has a part to validate on or not, once from its beginning to its end."""
    sha256, lengths, line_ends, held = hashlib.sha256(), [], set(), []

    def seen(blocks: Iterator[str]) -> Iterator[str]:
        for block in blocks:
            sha256.update(block.encode())
            lengths[-1] += len(block)
            held.append(block)
            if sum(lengths) > most_held:
                held.clear()
            yield block

    counts: Counter[str] = Counter()
    for part in parts:
        lengths.append(0)
        counts.update(count_characters(seen(part.blocks(line_ends, "reading"))))
    if len(parts) > 1:
        sha256.update(f"{lengths[0]} to train on".encode())
    # In fractions of integers, 0.1 is a tenth.
    shared = math.floor(lengths[0] * (1 - Fraction(str(config.val_fraction))))
    return Text(
        name,
        dict(counts),
        n_training=lengths[0] if len(parts) > 1 else shared,
        sha256=sha256.hexdigest(),
        line_ends=tuple(sorted(line_ends)),
        parts=tuple(parts),
        watched=watched,
        held="".join(held) if sum(lengths) <= most_held else None,
    )


def _watch(files: Iterable[str | bytes]) -> tuple[tuple[str, int, int], ...]:
    """Return each file with its size and when it was last changed; not what came by a pipe."""
    paths = [file for file in files if not isinstance(file, bytes)]
    states = [os.stat(path) for path in paths]
    return tuple(
        (path, state.st_size, state.st_mtime_ns) for path, state in zip(paths, states, strict=True)
    )


def _kept(name: str, files: Sequence[str | bytes], config: TextConfig) -> Path | None:
    """Return where what is known of a text in these files is kept, if they are files."""
    if any(isinstance(file, bytes) for file in files):
        return None
    key = repr([[os.path.abspath(file) for file in files], config])
    return TEXTS / f"{name}-{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:16]}.json"


def _ids_file(kept: Path, sha256: str) -> Path:
    """Return where the ids of a text are kept: in another file when it has changed."""
    return kept.with_name(f"{kept.stem}-{sha256[:16]}.ids")


def _remember(text: Text, kept: Path) -> None:
    """Write down what is known of a text, in place of what was known of it before it changed."""
    for old in kept.parent.glob(f"{glob.escape(kept.stem)}-*.ids"):
        # Windows keeps a file that another process has mapped.
        with contextlib.suppress(OSError):
            old.unlink()
    known = dataclasses.asdict(text) | {"ids_file": None}
    with in_place_of(kept) as temporary:
        temporary.write_text(json.dumps(known), encoding="utf-8")


def _recall(name: str, kept: Path | None, watched: tuple[tuple[str, int, int], ...]) -> Text | None:
    """Read what was written down of a text, if it can be used and no file has changed since."""
    if kept is None or not kept.exists():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        if tuple(map(tuple, known["watched"])) != watched:
            return None
        known["parts"] = tuple(
            Documents(tuple(map(tuple, part["files"])), part["n_binary"], tuple(part["unknown"]))
            for part in known["parts"]
        )
        known |= {"line_ends": tuple(known["line_ends"]), "watched": watched, "name": name}
        return Text(**known | {"ids_file": _ids_file(kept, known["sha256"])})
    return None
