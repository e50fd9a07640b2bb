"""The characters of a text and their ids."""

import itertools
import unicodedata
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

# Typographic characters that Unicode does not decompose, and what a keyboard has for them.
PLAIN_FORMS = {
    **dict.fromkeys("‘’‛′", "'"),
    **dict.fromkeys("“”„″«»", '"'),
    **dict.fromkeys("–—―−", "-"),
    "…": ".",
}

MOST_NAMED = 10
# Unicode's replacement character: where a vocabulary has it, it stands for all that are missing.
UNKNOWN = "\ufffd"
# Characters that are looked at together. With 16 times as many, memory for what is computed of them
# comes from the system anew each time, and a text of 1 GB takes 5.8 instead of 2.8 seconds.
BLOCK = 2**16


class Vocabulary:
    """The different characters of a text in code point order; a character's place is its id.

    >>> vocabulary = Vocabulary.of("banana")
    >>> vocabulary.characters, vocabulary.encode("nab").tolist(), vocabulary.decode([0, 2])
    ('abn', [2, 0, 1], 'an')
    """

    def __init__(self, characters: str):
        # A string longer than Unicode is not taken apart to be looked at.
        if not 0 < len(characters) <= 0x110000 or list(characters) != sorted(set(characters)):
            raise ValueError("a vocabulary needs different characters in code point order")
        self.characters = characters
        # One look-up in a table of every code point is twenty times as fast as a dictionary.
        self._id_of = torch.full((0x110000,), -1, dtype=torch.int32)
        self._id_of[_code_points(characters)] = torch.arange(len(characters), dtype=torch.int32)

    @classmethod
    def of(cls, text: str) -> Self:
        """Return the vocabulary of a text."""
        return cls.of_counts(count_characters([text]))

    @classmethod
    def of_counts(cls, counts: dict[str, int], min_count: int = 1) -> Self:
        """Return the vocabulary of the characters that come often enough.

        Rarer ones become one, the unknown character, which has an id but is never written.
        """
        known = {character for character, count in counts.items() if count >= min_count}
        if not known:
            most = max(counts.values())
            raise ValueError(
                f"min_count is {min_count}, but no character comes more than {most:,} times"
            )
        return cls("".join(sorted(known if len(known) == len(counts) else known | {UNKNOWN})))

    @property
    def id_type(self) -> torch.dtype:
        """The smallest type for ids."""
        size = len(self)
        return torch.uint8 if size <= 2**8 else torch.int16 if size <= 2**15 else torch.int32

    @property
    def unwritten(self) -> list[int]:
        """The ids that are never to be written: that of the unknown character."""
        unknown = self.characters.find(UNKNOWN)
        return [unknown] if unknown >= 0 and len(self) > 1 else []

    @property
    def start(self) -> str:
        """What a text begins after when there is no prompt: a line break, if there are any."""
        return "\n" if "\n" in self.characters else self.characters[0]

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, unknown: bool = False) -> Tensor:
        """Return the ids (N,) of N characters, or name those that the vocabulary lacks.

        They come in the smallest type: a byte for up to 256 characters. With `unknown`, the
        unknown character stands for those that are lacking, if there is one.
        """
        stand_in = self.characters.find(UNKNOWN) if unknown else -1
        ids = torch.empty(len(text), dtype=self.id_type)
        for start in range(0, len(text), BLOCK):
            block = self._id_of.index_select(0, _code_points(text[start : start + BLOCK]))
            if block.min() < 0:
                if stand_in < 0:
                    raise ValueError(self._describe_unknown(text))
                block[block < 0] = stand_in
            ids[start : start + BLOCK] = block
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the characters with these ids."""
        return "".join(self.characters[i] for i in ids)

    def known(self, text: str) -> str:
        """Return the text without the characters that the vocabulary lacks."""
        missing = set(text) - set(self.characters)
        return text.translate(dict.fromkeys(map(ord, missing))) if missing else text

    def nearest(self, character: str) -> str:
        """Return the known character most like an unknown one.

        That is a plain or other-case form of it, or else the nearest code point of its kind
        (letter, digit, punctuation, ...), or of any kind.
        """
        base = unicodedata.normalize("NFKD", character)[:1]
        for form in (PLAIN_FORMS.get(character), base, base.swapcase()):
            if form and form in self.characters:
                return form
        kind = unicodedata.category(character)[0]
        known = self.characters.replace(UNKNOWN, "") or UNKNOWN
        same_kind = [c for c in known if unicodedata.category(c)[0] == kind]
        return min(same_kind or known, key=lambda c: abs(ord(c) - ord(character)))

    def _describe_unknown(self, text: str) -> str:
        places: dict[str, int] = {}
        for place, character in enumerate(text, start=1):
            if character not in self.characters:
                places.setdefault(character, place)
        named = ", ".join(
            f"{c!r} (character {i}; nearest known: {self.nearest(c)!r})"
            for c, i in itertools.islice(places.items(), MOST_NAMED)
        )
        rest = f" and {len(places) - MOST_NAMED} more" if len(places) > MOST_NAMED else ""
        return f"the model does not know {named}{rest}"


def count_characters(blocks: Iterable[str]) -> dict[str, int]:
    """Return how often each character of a text in blocks comes, in code point order."""
    counts, ones = torch.zeros(0x110000, dtype=torch.int64), torch.ones(BLOCK, dtype=torch.int64)
    for text in blocks:
        for start in range(0, len(text), BLOCK):
            points = _code_points(text[start : start + BLOCK]).long()
            counts.scatter_add_(0, points, ones[: len(points)])
    return {chr(point): int(counts[point]) for point in counts.nonzero().flatten()}


def _code_points(text: str) -> Tensor:
    """Return the code points of a text that is not empty, (N,)."""
    # "surrogatepass" lets a command line with broken bytes through, to be named as unknown.
    return torch.frombuffer(bytearray(text, "utf-32-le", "surrogatepass"), dtype=torch.int32)
