"""One text out of files: what is in it, and its ids, in memory or, if it is long, in a file."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from data.catalogue import TEXTS
from data.encoding import check_encoding
from data.files import Documents, find_files, look_into, name_of
from data.vocabulary import Vocabulary, count_characters

# The characters of a longer text are not held in memory, but read again when they are needed.
HELD_CHARACTERS = 2**24
KEY_LENGTH = 16


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

    def ids(self, vocabulary: Vocabulary) -> Tensor:
        """Return the ids (N,) of its N characters, mapped from a file if the text is long."""
        if self.held is not None:
            return vocabulary.encode(self.held, unknown=True)
        kind = vocabulary.id_type
        if not self.ids_file.exists() or self.ids_file.stat().st_size != (
            self.n_characters * kind.itemsize
        ):
            self._write_ids(vocabulary)
        # A shared mapping takes no memory that the system could not take back.
        with self.ids_file.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        if hasattr(mapped, "madvise"):  # not on Windows
            # Windows from all over it are read: what is next to them would be read for nothing.
            mapped.madvise(mmap.MADV_RANDOM)
        return torch.frombuffer(mapped, dtype=kind)

    def _write_ids(self, vocabulary: Vocabulary) -> None:
        temporary = self.ids_file.with_suffix(".tmp")
        self.ids_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                for block in self.blocks("encoding"):
                    file.write(vocabulary.encode(block, unknown=True).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            if temporary.stat().st_size != self.n_characters * vocabulary.id_type.itemsize:
                raise ValueError(f"{self.name} has changed while it was read; try again")
            os.replace(temporary, self.ids_file)
        finally:
            temporary.unlink(missing_ok=True)


def read_text(paths: Sequence[str], config: TextConfig) -> Text:
    """Read files and folders into one text; without any, the source of Python's own library.

    What was found out about a long text is kept in a file, and holds for as long as its files
    have the same sizes and times of change.
    """
    name, files = name_of(paths), find_files(paths, config.glob)
    validation_files = [] if config.val_text is None else find_files([config.val_text], None)
    kept = _kept(name, [*files, *validation_files], config)
    if known := _recall(name, kept):
        return known
    parts = [look_into(files, config.encoding)]
    if validation_files:
        parts.append(look_into(validation_files, config.encoding))
    # What came through a pipe is in memory already.
    text = _look_through(name, parts, config, math.inf if kept is None else HELD_CHARACTERS)
    if not text.counts:
        raise ValueError(f"{' and '.join(paths)} is empty; a text needs characters to learn from")
    if text.held is None:
        _remember(text, kept)
        return dataclasses.replace(text, ids_file=kept.with_suffix(".ids"))
    return text


def _look_through(
    name: str, parts: Sequence[Documents], config: TextConfig, most_held: float
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
        held="".join(held) if sum(lengths) <= most_held else None,
    )


def _kept(name: str, files: Sequence[tuple[str | bytes, bool]], config: TextConfig) -> Path | None:
    """Return where what is known of a text in these files is kept, if they are files."""
    if any(isinstance(file, bytes) for file, _ in files):
        return None
    states = [(os.path.abspath(file), os.stat(file)) for file, _ in files]
    key = repr([(path, state.st_size, state.st_mtime_ns) for path, state in states] + [config])
    return TEXTS / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:KEY_LENGTH]}.json"


def _remember(text: Text, kept: Path) -> None:
    """Write down what is known of a text, in place of what was known of it before it changed."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{glob.escape(text.name)}-{'?' * KEY_LENGTH}.*"):
        # Windows keeps a file that another process has mapped.
        with contextlib.suppress(OSError):
            old.unlink()
    known = dataclasses.asdict(text)
    temporary = kept.with_suffix(".new")
    temporary.write_text(json.dumps(known), encoding="utf-8")
    os.replace(temporary, kept)


def _recall(name: str, kept: Path | None) -> Text | None:
    """Read what was written down of a text, if there is anything that can be used."""
    if kept is None or not kept.exists():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        known["parts"] = tuple(
            Documents(tuple(map(tuple, part["files"])), part["n_binary"], tuple(part["unknown"]))
            for part in known["parts"]
        )
        known["line_ends"] = tuple(known["line_ends"])
        return Text(**known | {"name": name, "ids_file": kept.with_suffix(".ids")})
    return None
