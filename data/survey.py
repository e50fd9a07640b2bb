"""What is worth knowing about a text, and how much of another is copied from it."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

# Shorter lines may well repeat: a name, a heading, a brace.
LONG_LINE = 20
MOST_NAMED = 10
FEW = 10
SURVEYED_CHARACTERS = 2**24
# Shorter passages come again by chance, too.
LONG_COPY = 20


def survey(counts: dict[str, int], blocks: Iterable[str]) -> str:
    """Describe what is rare in a text and what is repeated, a line each.

    Wrongly decoded text shows among the rarest characters, copied text among the repeated lines,
    which are looked for in the first `SURVEYED_CHARACTERS`.
    """
    characters = ""
    for block in blocks:
        characters += block
        if len(characters) >= SURVEYED_CHARACTERS:
            break
    characters = characters[:SURVEYED_CHARACTERS]
    rarest = sorted(counts, key=counts.get)[:MOST_NAMED]
    named = ", ".join(f"{character!r} {counts[character]:,}" for character in rarest)
    rare = sum(count < FEW for count in counts.values())
    lines = Counter(line for line in characters.split("\n") if len(line) >= LONG_LINE)
    repeated = sum(count for count in lines.values() if count > 1)
    most = ""
    if repeated:
        line, count = lines.most_common(1)[0]
        most = f"; most often, {count:,} times: {line[:60]!r}"
    return (
        f"rarest   {named}; {rare:,} characters come fewer than {FEW} times\n"
        f"lines    {lines.total():,} of {LONG_LINE} characters or more, {repeated:,} of them more "
        f"than once{most}"
    )


def coverage(counts: dict[str, int]) -> str:
    """Say how few characters make up nearly all of a text, and how to do without the others.

    Empty if the rarest are not that rare.
    """
    values = np.array(list(counts.values()))
    for min_count in (100, 50, 20, 10, 5, 3, 2):
        often = values >= min_count
        share = values[often].sum() / values.sum()
        if share >= 0.995 and not often.all():
            return (
                f"{often.sum():,} of {len(values):,} characters cover {share:.1%} of the text; "
                f"--min_count {min_count} makes the others one"
            )
    return ""


def count_copied(written: str, source: str) -> tuple[int, str]:
    """Return how many characters lie in passages copied from a source, and the longest passage.

    What counts are passages of at least `LONG_COPY` characters; the longest may be shorter.
    """
    in_copies, counted_to, longest, length = 0, 0, "", 0
    # With a source of 100 MB, 500 characters take most of a minute.
    places = tqdm(range(len(written)), "looking for copies", leave=False, disable=None, delay=1)
    for start in places:
        # What begins a character later is at most one shorter. So there are two look-ups at most
        # for each character, each of which may read all of the source.
        length = max(0, length - 1)
        while start + length < len(written) and written[start : start + length + 1] in source:
            length += 1
        if length >= LONG_COPY:
            in_copies += start + length - max(start, counted_to)
            counted_to = start + length
        longest = max(longest, written[start : start + length], key=len)
    return in_copies, longest
