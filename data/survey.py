"""What is worth knowing about a text, and how much of another is copied from it."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

# Shorter lines may well repeat: a name, a heading, a brace.
LONG_LINE = 20
MOST_NAMED = 10
FEW = 10
SURVEYED_CHARACTERS = 2**24
# Passages of as many characters that came again in the rest of their text made up 0 % of new pages
# of Shakespeare, 7 % of Chinese poems, some of which stand there twice, and 55 % of Python code.
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


def copied_passages(written: str, source: str) -> tuple[int, str]:
    """Return how many characters lie in passages that stand in a source, too, and the longest.

    Only passages of at least `LONG_COPY` characters count; the longest may be shorter.
    """
    in_copies, counted_to, longest, length = 0, 0, "", 0
    for start in range(len(written)):
        # What begins a character later is at most one shorter: so all of it takes few look-ups.
        length = max(0, length - 1)
        while start + length < len(written) and written[start : start + length + 1] in source:
            length += 1
        if length >= LONG_COPY:
            in_copies += start + length - max(start, counted_to)
            counted_to = start + length
        longest = max(longest, written[start : start + length], key=len)
    return in_copies, longest
