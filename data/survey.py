"""What is worth knowing about a text before anything is trained on it."""

from collections import Counter

import numpy as np

from data.vocabulary import count_characters

# Shorter lines may well repeat: a name, a heading, a brace.
LONG_LINE = 20
MOST_NAMED = 10
FEW = 10


def survey(characters: str) -> str:
    """Describe what is rare in a text and what is repeated, a line each.

    Wrongly decoded text shows among the rarest characters, copied text among the repeated lines.
    """
    counts = count_characters(characters)
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


def coverage(characters: str) -> str:
    """Say how few characters make up nearly all of a text, and how to do without the others.

    Empty if the rarest are not that rare.
    """
    counts = np.array(list(count_characters(characters).values()))
    for min_count in (100, 50, 20, 10, 5, 3, 2):
        often = counts >= min_count
        share = counts[often].sum() / counts.sum()
        if share >= 0.995 and not often.all():
            return (
                f"{often.sum():,} of {len(counts):,} characters cover {share:.1%} of the text; "
                f"--min_count {min_count} makes the others one"
            )
    return ""
