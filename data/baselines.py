"""What models of a text cost that know nothing, or only how often characters follow each other."""

import lzma
import math

import numpy as np
from torch import Tensor

from data.vocabulary import Vocabulary

# Counting or compressing more characters of a training part than this takes longer than it tells.
COUNTED_CHARACTERS, COMPRESSED_CHARACTERS = 2**22, 2**20


def baselines(
    training_ids: Tensor, validation_ids: Tensor, vocabulary: Vocabulary
) -> dict[str, float]:
    """Return bits per character of a validation part, by the name of what predicts it.

    Its first character is not predicted. "uniform" knows the vocabulary; "unigram", "bigram" and
    "trigram" have counted the training part; "xz" has compressed it, and now adds the rest.
    """
    # More is not counted, and a GPU may have room for more than the computer.
    training_ids = training_ids[-COUNTED_CHARACTERS:].cpu().numpy()
    validation_ids = validation_ids.cpu().numpy()
    # The character before the validation part is the last one to train on.
    read = np.concatenate((training_ids[-1:], validation_ids))
    wanted = np.lib.stride_tricks.sliding_window_view(read, 3)  # each character after two others
    bits = ngram_bits(training_ids, wanted, len(vocabulary))
    known = training_ids[-COMPRESSED_CHARACTERS:]
    more = np.concatenate((known, validation_ids[1:]))
    before, after = (len(lzma.compress(vocabulary.decode(x).encode())) for x in (known, more))
    return bits | {"xz": 8 * (after - before) / len(wanted)}


def ngram_bits(training_ids: np.ndarray, wanted: np.ndarray, V: int) -> dict[str, float]:
    """Return bits per character for predicting the last of three wanted characters, (N, 3).

    A context that was followed by T different characters in N places expects a new one in
    T / (N + T) of the cases, and then asks the context that is shorter by one ("The zero-frequency
    problem", Witten and Bell, 1991, method C); the empty one asks the uniform distribution.
    """
    training_ids, wanted = training_ids.astype(np.int64), wanted.astype(np.int64)
    probability = np.full(len(wanted), 1 / V)
    bits = {"uniform": math.log2(V)}
    for length, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        # An n-gram is a number with n digits, and its context the number without the last one.
        n_grams = len(training_ids) - length + 1
        codes = sum(training_ids[i : i + n_grams] * V ** (length - 1 - i) for i in range(length))
        asked = sum(wanted[:, i - length] * V ** (length - 1 - i) for i in range(length))
        grams, counts = np.unique(codes, return_counts=True)
        contexts, first = np.unique(grams // V, return_index=True)
        totals = np.add.reduceat(counts, first)
        followers = np.diff(first, append=len(grams))
        n = _look_up(grams, counts, asked)
        N, T = (_look_up(contexts, of, asked // V) for of in (totals, followers))
        probability = np.where(N > 0, (n + T * probability) / np.maximum(N + T, 1), probability)
        bits[name] = float(np.log2(1 / probability).mean())
    return bits


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the values of the wanted keys, 0 for those that are missing; keys are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
