"""From ids to batches: windows in spread order to train on, and in order to evaluate.

A window is `block_size` characters of the text, the inputs, and for each of them the one after it,
its target.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Validating takes one character to predict and one before it. The context is at most half of the
# training part: of 18 characters, that is still 9.
FEWEST_TO_TRAIN, FEWEST_TO_VALIDATE = 18, 2
# How many characters a stretch has that is read of a long text: a multiple of common contexts, so
# that a window reaches into the next stretch with its last target only.
STRETCH = 4096
# (sqrt(5) - 1) / 2 in units of 2^-64: of all steps, multiples of this one stay farthest apart.
GOLDEN_SECTION = np.uint64(0x9E3779B97F4A7C15)


def fit_block_size(n_training: int, n_validation: int, block_size: int) -> int:
    """Return the context that a text is long enough for: at most half of its training part."""
    if n_training < FEWEST_TO_TRAIN or n_validation < FEWEST_TO_VALIDATE:
        raise ValueError(
            f"the text is too short: {n_training} characters to train on and {n_validation} to "
            f"validate on, but it takes at least {FEWEST_TO_TRAIN} and {FEWEST_TO_VALIDATE}"
        )
    return min(block_size, n_training // 2)


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """Return the seed of what is random in one part of a step, the dropout: 63 bits.

    torch's CPU generator looks at the lowest 32 bits only, so these are hashed, not added.
    """
    return int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0] >> 1)


def draw_starts(length: int, batch_size: int, block_size: int, seed: int, step: int) -> Tensor:
    """Return where the windows of a batch start, all over a text of some length: (B,).

    Each window starts a golden section of the text after the one before it, around the end to
    the beginning; the seed decides where the first one is (a Weyl sequence: Knuth, The Art of
    Computer Programming, volume 3, section 6.4). So every batch is spread evenly over
    the text, and windows that add up to its length leave out a seventh of it at most; drawn at
    random, they leave out more than a third. `small` is at 1.63 instead of 1.66 nats after 1.4
    readings of Shakespeare.

    The batch depends on (seed, step) and on nothing else, so a resumed run sees exactly the
    batches that it would have seen without the interruption. A text with no more than
    `block_size` characters is a ValueError.
    """
    if length <= block_size:
        raise ValueError(f"the text has {length} characters; block_size {block_size} needs more")
    numbers = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
    # Places in units of 2^-64 of the text: unsigned integers wrap around where the text does.
    (first,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    places = ((first + numbers * GOLDEN_SECTION) >> np.uint64(11)) / 2**53  # from 0 to below 1
    return torch.from_numpy((places * (length - block_size)).astype(np.int64))


def read_windows(ids: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Read windows of a text, given where they start (B,): inputs and targets, (B, T) each."""
    windows = ids.unfold(0, block_size + 1, 1)[starts].long()  # (B, T + 1)
    # The target of each character is the character after it.
    return windows[:, :-1], windows[:, 1:]


def read_in_order(ids: Tensor, block_size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Read a text in windows side by side: inputs and targets, (B, T) each.

    Every character but the first is a target exactly once, in order; what is left over after the
    last whole window comes as a shorter one.
    """
    n_windows = (len(ids) - 1) // block_size
    starts = torch.arange(n_windows) * block_size
    for several in starts.split(batch_size) if n_windows else ():
        yield read_windows(ids, several, block_size)
    rest = ids[n_windows * block_size :].long()
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]


def evenly_spaced(ids: Tensor, max_characters: int) -> Tensor:
    """Return a text as it is, or about `max_characters` of it: stretches from all over it.

    Models that look back differently far read the same characters of it.
    """
    if len(ids) - 1 <= max_characters:
        return ids
    n_stretches = max_characters // STRETCH
    chosen = torch.arange(n_stretches) * (len(ids) // STRETCH) // n_stretches
    return ids.unfold(0, STRETCH, STRETCH)[chosen].flatten()
