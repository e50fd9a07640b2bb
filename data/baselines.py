"""What models of a text cost that know nothing, or only how often characters follow each other."""

import lzma
import math

import numpy as np

# Counting more characters of a training part than this takes longer than it tells.
COUNTED_CHARACTERS = 2**22


def baselines(
    training_ids: np.ndarray, validation_ids: np.ndarray, targets: np.ndarray, characters: str
) -> dict[str, float]:
    """Return bits per character of a validation part, by the name of what predicts it.

    `targets` are the places in it that are predicted, each from the characters before it, and
    `characters` is the vocabulary. "uniform" knows the vocabulary; "unigram", "bigram" and
    "trigram" have counted the training part; "xz" has compressed it, and now adds the rest.
    """
    training_ids = training_ids[-COUNTED_CHARACTERS:]
    ids = np.concatenate((training_ids, validation_ids)).astype(np.int64)
    bits = ngram_bits(ids, len(training_ids), targets + len(training_ids), len(characters))
    read = np.concatenate((validation_ids[:1], validation_ids[targets]))
    before, after = (
        len(lzma.compress(_utf8(part, characters)))
        for part in (training_ids, np.concatenate((training_ids, read)))
    )
    return bits | {"xz": 8 * (after - before) / len(read)}


def ngram_bits(ids: np.ndarray, n_training: int, targets: np.ndarray, V: int) -> dict[str, float]:
    """Return bits per character of some places in a text for the first `n_training` counted.

    A context that was followed by T different characters in N places expects a new one in
    T / (N + T) of the cases, and then asks the context that is shorter by one ("The zero-frequency
    problem", Witten and Bell, 1991, method C); the empty one asks the uniform distribution.
    """
    probability = np.full(len(targets), 1 / V)
    bits = {"uniform": math.log2(V)}
    codes = np.zeros(len(ids), dtype=np.int64)
    for length, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        # Number the n-grams that end at each place; their context is the number without its end.
        codes = ids.copy() if length == 1 else np.concatenate(([0], codes[:-1])) * V + ids
        grams, counts = np.unique(codes[length - 1 : n_training], return_counts=True)
        contexts, first = np.unique(grams // V, return_index=True)
        totals = np.add.reduceat(counts, first)
        followers = np.diff(first, append=len(grams))
        n = _look_up(grams, counts, codes[targets])
        N, T = (_look_up(contexts, of, codes[targets] // V) for of in (totals, followers))
        probability = np.where(N > 0, (n + T * probability) / np.maximum(N + T, 1), probability)
        bits[name] = float(-np.log2(probability).mean())
    return bits


def bytes_per_character(ids: np.ndarray, characters: str) -> float:
    """Return how many bytes a character of a text takes in UTF-8, on average."""
    lengths = np.array([len(character.encode()) for character in characters])
    return float(lengths[ids].mean())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the values of the wanted keys, 0 for those that are missing; keys are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _utf8(ids: np.ndarray, characters: str) -> bytes:
    code_points = np.array([ord(character) for character in characters], dtype="<u4")
    return code_points[ids].tobytes().decode("utf-32-le").encode()
