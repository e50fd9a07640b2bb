"""Files become text, text becomes ids, ids become windows; nothing is lost on the way."""

import lzma
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import characters, read_file

from data import (
    TextConfig,
    Vocabulary,
    baselines,
    count_copied,
    coverage,
    draw_starts,
    evenly_spaced,
    fit_block_size,
    read_in_order,
    read_text,
    read_windows,
    step_seed,
    survey,
)
from data.baselines import ngram_bits
from data.batches import STRETCH


def test_line_ends_and_byte_order_mark_are_normalised():
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_file("a.txt") == "one\ntwo\nthree\n"


def test_byte_that_is_not_utf8_is_named_with_its_position():
    Path("a.txt").write_bytes("Zoë".encode("latin-1") + b"!")
    with pytest.raises(ValueError, match=r"a\.txt is not in UTF-8 \(byte 0xeb at position 2\)"):
        read_file("a.txt")


def test_folder_is_read_in_order_without_hidden_and_binary_files():
    Path("texts/.git").mkdir(parents=True)
    Path("texts/more").mkdir()
    Path("texts/b.txt").write_text("second")
    Path("texts/a.md").write_text("first\n")
    Path("texts/more/c").write_text("third\n")
    Path("texts/empty").write_text("")
    Path("texts/.git/config").write_text("hidden")
    Path("texts/picture.png").write_bytes(b"\x89PNG\0\0")
    text = read_text(["texts"], TextConfig())
    assert characters(text) == "first\n\nsecond\n\nthird\n"
    assert (text.name, len(text.parts[0].files), text.parts[0].n_binary) == ("texts", 4, 1)


def test_files_are_read_in_the_order_given_and_one_file_as_it_is():
    Path("a.txt").write_text("one")
    Path("b.txt").write_text("two\n")
    assert characters(read_text(["b.txt", "a.txt"], TextConfig())) == "two\n\none\n"
    assert characters(read_text(["a.txt"], TextConfig())) == "one"
    assert read_text(["a.txt"], TextConfig()).sha256 != read_text(["b.txt"], TextConfig()).sha256


def test_without_paths_the_text_is_pythons_own_library():
    text = read_text([], TextConfig())
    assert text.name == "python"
    assert len(characters(text)) > 1_000_000
    assert "\nclass ArgumentParser(" in characters(text)


def test_vocabulary_encodes_and_decodes_any_character():
    text = "a\n\tZoë 李雷 😀\U0010ffff\0"
    vocabulary = Vocabulary.of(text)
    assert vocabulary.decode(vocabulary.encode(text).tolist()) == text
    assert vocabulary.characters == "".join(sorted(set(text)))
    assert vocabulary.encode("").tolist() == []


def test_rare_characters_become_one_that_is_never_written():
    vocabulary = Vocabulary.of_counts(Counter("aaabbbccdé"), min_count=3)
    assert vocabulary.characters == "ab\ufffd"
    assert vocabulary.encode("abcdéz", unknown=True).tolist() == [0, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="'c' \\(character 3"):
        vocabulary.encode("abcdéz")
    assert vocabulary.unwritten == [2]
    # Where all others have higher code points, the unknown character is the first.
    faces = Vocabulary.of_counts(Counter("😀😀😀😁"), min_count=3)
    assert faces.encode("😀😁", unknown=True).tolist() == [1, 0]
    assert faces.unwritten == [0]
    assert Vocabulary.of_counts(Counter("aaabbb"), min_count=3).unwritten == []
    with pytest.raises(ValueError, match="no character comes more than 3 times"):
        Vocabulary.of_counts(Counter("aaabbb"), min_count=4)


def test_survey_shows_rare_characters_and_repeated_lines():
    line = "A line of some length, which comes thrice."
    text = "\n".join([line, "Another one of some length.", line, line, "short", "short"])
    said = survey(Counter(text), [text[:50], text[50:]])
    assert "lines    4 of 20 characters or more, 3 of them more than once" in said
    assert f"most often, 3 times: {line!r}" in said
    assert survey(Counter("é\x92" + 27 * "a"), [""]).startswith(
        "rarest   'é' 1, '\\x92' 1, 'a' 27; 2 characters"
    )


def test_copied_passages_count_once_and_only_if_they_are_long():
    source = "The first passage, of some length. The second one, which is as long."
    first, second, short = source[:30], source[20:60], source[40:59]
    assert count_copied(f"??{source[:60]}??", source) == (60, source[:60])
    assert count_copied(f"{first}??{second}", source) == (70, second)
    assert count_copied(f"??{short}??", source) == (0, short)
    assert count_copied(f"??{source[:20]}??", source) == (20, source[:20])
    assert count_copied("", source) == (0, "")
    # Each half stands there, but not both of them in a row.
    both, apart = "a" * 25 + "b" * 25, "a" * 25 + "b, a" + "b" * 25
    assert count_copied(both, apart) == (50, "a" * 25 + "b")


def test_coverage_tells_which_characters_a_text_can_do_without():
    text = "".join(map(chr, range(100, 105))) * 300 + "".join(map(chr, range(1000, 1005)))
    assert (
        coverage(Counter(text))
        == "5 of 10 characters cover 99.7% of the text; --min_count 100 makes the others one"
    )
    assert coverage(Counter("abc")) == ""


def test_unknown_characters_are_named_with_position_and_nearest():
    vocabulary = Vocabulary.of("Hello, world 3'\"-")
    with pytest.raises(ValueError, match="does not know") as raised:
        vocabulary.encode("Héllo “W4”")
    message = str(raised.value)
    assert "'é' (character 2; nearest known: 'e')" in message
    assert "'“' (character 7; nearest known: '\"')" in message
    assert "'W' (character 8; nearest known: 'w')" in message
    assert "'4' (character 9; nearest known: '3')" in message
    assert vocabulary.known("Héllo “W4”") == "Hllo "


def test_stand_in_is_like_no_other_character():
    vocabulary = Vocabulary.of_counts(Counter("aaabbb😀"), min_count=3)
    with pytest.raises(ValueError, match="nearest known: 'b'"):
        vocabulary.encode("😁")


def test_known_characters_take_little_memory_to_find():
    vocabulary, text = Vocabulary.of("李雷"), "李雷" * 500_000 + "。"
    tracemalloc.start()
    known = vocabulary.known(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert known == text[:-1]
    assert peak < 5 * len(text)


def test_many_unknown_characters_are_counted():
    with pytest.raises(ValueError, match="and 15 more") as raised:
        Vocabulary.of("a").encode("bcdefghijklmnopqrstuvwxyz" * 2)
    assert str(raised.value).count("'b'") == 1


def test_command_line_bytes_that_are_no_text_are_unknown_characters():
    with pytest.raises(ValueError, match="does not know"):
        Vocabulary.of("a").encode("\udcff")


@pytest.mark.parametrize("characters", ["", "ba", "aa"])
def test_vocabulary_that_is_not_one_is_refused(characters):
    with pytest.raises(ValueError, match="different characters"):
        Vocabulary(characters)


@pytest.mark.parametrize(
    ("n", "fraction", "n_training"),
    [(1_115_394, 0.1, 1_003_854), (20, 0.1, 18), (1000, 0.3, 700), (100, 0.001, 99)],
)
def test_end_of_the_text_is_for_validation(n, fraction, n_training):
    Path("book.txt").write_text("a" * n)
    assert read_text(["book.txt"], TextConfig(val_fraction=fraction)).n_training == n_training


def test_another_text_may_be_for_validation():
    Path("book.txt").write_text("to train on")
    Path("other.txt").write_bytes("zu prüfen\r\n".encode("cp1252"))
    text = read_text(["book.txt"], TextConfig(val_text="other.txt", encoding="cp1252"))
    assert (characters(text)[: text.n_training], characters(text)[text.n_training :]) == (
        "to train on",
        "zu prüfen\n",
    )


@pytest.mark.parametrize(("n", "wanted", "fitting"), [(900, 64, 64), (90, 64, 45), (18, 8, 8)])
def test_context_shrinks_to_fit_a_short_text(n, wanted, fitting):
    assert fit_block_size(n, 2, wanted) == fitting
    draw_starts(n, 2, fitting, seed=1, step=0)
    assert sum(y.numel() for _, y in read_in_order(torch.arange(n), fitting, 4)) == n - 1


@pytest.mark.parametrize(("n_training", "n_validation"), [(17, 2), (18, 1)])
def test_too_short_a_text_is_refused(n_training, n_validation):
    sentence = f"{n_training} characters to train on and {n_validation} to validate on"
    with pytest.raises(ValueError, match=f"{sentence}, but it takes at least 18 and 2"):
        fit_block_size(n_training, n_validation, 8)


def test_window_needs_a_character_after_it():
    assert draw_starts(9, 2, 8, seed=1, step=0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="the text has 8 characters; block_size 8 needs more"):
        draw_starts(8, 2, 8, seed=1, step=0)


def test_targets_are_the_next_characters_and_windows_stay_inside():
    starts = draw_starts(50, 1000, 8, seed=1, step=0)
    inputs, targets = read_windows(torch.arange(50), starts, 8)
    assert inputs.shape == targets.shape == (1000, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs + 1, targets)
    assert (inputs.min(), targets.max()) == (0, 49)


def test_batch_depends_on_seed_and_step_alone():
    def batch(seed, step):
        return draw_starts(100_000, 4, 8, seed, step)

    first = batch(1, 2)
    torch.manual_seed(0)
    assert torch.equal(first, batch(1, 2))
    for other in [(2, 2), (1, 3), (2, 1), (1 + 2**32, 2), (1, 2 + 2**32)]:
        assert not torch.equal(first, batch(*other))
    # torch's CPU generator ignores all but the lowest 32 bits of its seed.
    seeds = {step_seed(seed, step) % 2**32 for seed in range(10) for step in range(100)}
    assert len(seeds) == 1000


@pytest.mark.parametrize(("n", "block_size"), [(100_000, 8), (100_000, 64), (5_000, 128)])
def test_windows_are_spread_evenly_over_the_text(n, block_size):
    ids, read = torch.arange(n), torch.zeros(n, dtype=torch.long)
    steps = n // (16 * block_size) + 1
    for step in range(2 * steps):
        inputs, _ = read_windows(ids, draw_starts(n, 16, block_size, 1, step), block_size)
        read += torch.bincount(inputs.flatten(), minlength=n)
        if step == steps - 1:
            # Drawn at random, they leave out 37 % after one reading, and 13 % after two.
            assert (read == 0).float().mean() < 0.2
            assert read.max() <= 3
    assert (read == 0).float().mean() < 0.02


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 50])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_reading_in_order_predicts_every_character_once(length, batch_size):
    windows = list(read_in_order(torch.arange(length), 8, batch_size))
    targets = torch.cat([targets.flatten() for _, targets in windows])
    assert targets.tolist() == list(range(1, length))
    for inputs, targets in windows:
        assert torch.equal(inputs + 1, targets)
        assert len(inputs) <= batch_size


def test_ngram_baselines_agree_with_counting_by_hand(story):
    """The same smoothing, written out for one place of the text at a time."""
    ids = Vocabulary.of(story).encode(story).tolist()[:1500]
    n_training, V = 1200, len(set(story))
    sums = dict.fromkeys(("uniform", "unigram", "bigram", "trigram"), 0.0)
    for place in range(n_training, len(ids)):
        probability = 1 / V
        sums["uniform"] -= math.log2(probability)
        for length, name in enumerate(("unigram", "bigram", "trigram")):
            context = ids[place - length : place]
            followers = Counter(
                ids[i] for i in range(length, n_training) if ids[i - length : i] == context
            )
            if followers:
                n, N, T = followers[ids[place]], followers.total(), len(followers)
                probability = (n + T * probability) / (N + T)
            sums[name] -= math.log2(probability)
    wanted = np.array([ids[place - 2 : place + 1] for place in range(n_training, len(ids))])
    bits = ngram_bits(np.array(ids[:n_training]), wanted, V)
    assert bits == pytest.approx({name: total / len(wanted) for name, total in sums.items()})
    assert bits["trigram"] < bits["bigram"] < bits["unigram"] < bits["uniform"]


def test_first_characters_to_validate_on_follow_the_last_ones_to_train_on(story):
    vocabulary = Vocabulary.of(story)
    ids = vocabulary.encode(story)
    bits = baselines(ids[:5000], ids[5000:5003], vocabulary)
    wanted = np.array([ids[4999:5002].tolist(), ids[5000:5003].tolist()])
    assert bits["trigram"] == ngram_bits(ids[:5000].numpy(), wanted, len(vocabulary))["trigram"]


def test_xz_counts_what_it_adds_for_the_validation_part(story):
    vocabulary = Vocabulary.of(story)
    ids = vocabulary.encode(story)
    bits = baselines(ids[:5000], ids[5000:], vocabulary)
    read = story[:5000] + story[5001:]  # the first character is not predicted
    added = len(lzma.compress(read.encode())) - len(lzma.compress(story[:5000].encode()))
    assert bits["xz"] == 8 * added / (len(story) - 5001)


def test_evenly_spaced_stretches_of_a_long_text():
    ids = torch.arange(1_000_000)
    part = evenly_spaced(ids, 50_000)
    stretches = part.view(-1, STRETCH)
    assert len(stretches) == 50_000 // STRETCH
    assert (stretches.diff(dim=1) == 1).all()
    starts = stretches[:, 0]
    assert starts[0] == 0
    # A twelfth of the text lies between the beginnings of two, up to a stretch more or less.
    assert (starts.diff() - 1_000_000 / len(stretches)).abs().max() <= STRETCH
    assert evenly_spaced(part, 50_000) is part


def test_evenly_spaced_is_all_of_a_short_text():
    ids = torch.arange(50_001)
    assert evenly_spaced(ids, 50_000) is ids
    assert len(evenly_spaced(torch.arange(50_002), 50_000)) == 50_000 // STRETCH * STRETCH
