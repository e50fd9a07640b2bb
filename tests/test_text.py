"""A long text is not held in memory, and is the same text all the same."""

import io
import os
import sys
from pathlib import Path

import pytest
from conftest import SMALL, characters

import train
from checkpoint import BEST, LAST
from data import TextConfig, Vocabulary, read_text, text


@pytest.fixture
def _long(monkeypatch):
    """Take every text for one that is too long to be held."""
    monkeypatch.setattr(text, "HELD_CHARACTERS", 100)


def kept() -> list[str]:
    return sorted(path.suffix for path in Path("out/texts").iterdir())


@pytest.mark.usefixtures("_long")
def test_long_text_is_the_same_text(book, story):
    Path("more.txt").write_bytes("Zoë\r\n".encode("utf-16"))
    configs = [TextConfig(), TextConfig(val_text="more.txt"), TextConfig(min_count=200)]
    for known, config in enumerate(configs, start=1):
        for _ in range(2):  # read, and found again
            long = read_text([book, "more.txt"], config)
            whole = story + "\nZoë\n" + ("Zoë\n" if config.val_text else "")
            assert (characters(long), long.n_characters) == (whole, len(whole))
            vocabulary = Vocabulary.of_counts(long.counts, config.min_count)
            ids = long.ids(vocabulary)
            assert ids.equal(vocabulary.encode(whole, unknown=True))
            assert (long.encodings, long.line_ends) == (["utf_16", "utf_8"], ("\n", "\r\n"))
        assert kept() == [".ids"] * known + [".json"] * known


@pytest.mark.usefixtures("_long")
def test_what_is_known_is_found_again_until_the_text_changes(book, monkeypatch):
    first = read_text([book], TextConfig())
    vocabulary = Vocabulary.of_counts(first.counts)
    first.ids(vocabulary)
    with monkeypatch.context() as patch:
        patch.setattr(text, "look_into", None)  # nothing is looked into again
        again = read_text([book], TextConfig())
        patch.setattr(Vocabulary, "encode", None)
        assert again.ids(vocabulary).equal(first.ids(vocabulary))
    Path(book).write_text("Another text. " * 10)
    changed = read_text([book], TextConfig())
    assert characters(changed) == "Another text. " * 10
    changed.ids(Vocabulary.of_counts(changed.counts))
    assert kept() == [".ids", ".json"]


@pytest.mark.usefixtures("_long")
def test_what_is_known_is_found_out_again_if_it_is_damaged(book, story):
    read_text([book], TextConfig())
    (known,) = Path("out/texts").iterdir()
    for damaged in ("", "[]", '{"parts": []}'):
        known.write_text(damaged)
        assert characters(read_text([book], TextConfig())) == story


@pytest.mark.usefixtures("_long")
def test_long_text_from_a_pipe_is_held(story, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(story.encode())))
    long = read_text(["-"], TextConfig())
    vocabulary = Vocabulary.of(story)
    assert long.ids(vocabulary).equal(vocabulary.encode(story))
    assert not Path("out").exists()


@pytest.mark.usefixtures("_long")
def test_interrupted_encoding_leaves_nothing_that_is_taken_for_whole(book, story, monkeypatch):
    monkeypatch.setattr("data.files.BLOCK", 1000)
    long = read_text([book], TextConfig())
    vocabulary = Vocabulary.of(story)
    encode, calls = Vocabulary.encode, []

    def break_off(self, block, **options):
        calls.append(block)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, block, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Vocabulary, "encode", break_off)
        with pytest.raises(KeyboardInterrupt):
            long.ids(vocabulary)
    assert kept() == [".json"]
    # A file that a crash has cut is written anew.
    long.ids_file.write_bytes(b"cut")
    assert long.ids(vocabulary).equal(vocabulary.encode(story))


@pytest.mark.usefixtures("_long")
def test_text_that_changes_while_it_is_encoded_is_noticed(book, story):
    long = read_text([book], TextConfig())
    Path(book).write_text(story + "Ada.")
    with pytest.raises(ValueError, match="book has changed while it was read"):
        long.ids(Vocabulary.of(story))
    assert kept() == [".json"]
    # As many characters, and other ones, known or not.
    for other in (story[::-1], story.replace("A", "Q")):
        long = read_text([book], TextConfig())
        Path(book).write_text(other)
        os.utime(book, (1, 1))
        with pytest.raises(ValueError, match="book has changed while it was read"):
            long.ids(Vocabulary.of(story))
    assert kept() == [".json"]


@pytest.mark.usefixtures("_long")
def test_two_runs_may_encode_a_text_at_the_same_time(book, story, monkeypatch):
    monkeypatch.setattr("data.files.BLOCK", 1000)
    first, second = (read_text([book], TextConfig()) for _ in range(2))
    vocabulary, encode, calls = Vocabulary.of(story), Vocabulary.encode, []

    def start_another(self, block, **options):
        calls.append(block)
        if len(calls) == 2:
            # Another process has another number.
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                assert second.ids(vocabulary).equal(encode(vocabulary, story))
        return encode(self, block, **options)

    monkeypatch.setattr(Vocabulary, "encode", start_another)
    assert first.ids(vocabulary).equal(encode(vocabulary, story))
    assert kept() == [".ids", ".json"]


@pytest.mark.usefixtures("_long")
def test_what_is_kept_of_other_texts_stays(book, story):
    Path("out/texts").mkdir(parents=True)
    Path("out/texts/book-2024-01-01-final.txt").touch()
    Path("other").mkdir()
    Path("other/book.txt").write_text(story.upper())
    for path in (book, "other/book.txt", book, "other/book.txt"):
        long = read_text([path], TextConfig())
        long.ids(Vocabulary.of_counts(long.counts))
    assert kept() == [".ids", ".ids", ".json", ".json", ".txt"]


@pytest.mark.usefixtures("_long")
def test_what_is_kept_is_no_part_of_a_text(book, story, monkeypatch):
    Path("inside").mkdir()
    monkeypatch.chdir("inside")
    for _ in range(2):
        assert characters(read_text([".."], TextConfig())) == story


def test_training_on_a_long_text_is_training_on_it(book, monkeypatch):
    words = [book, *SMALL, "--max_steps", "30"]
    assert train.main([*words, "--out", "held"]) == 0
    monkeypatch.setattr(text, "HELD_CHARACTERS", 100)
    assert train.main([*words, "--out", "mapped"]) == 0
    assert train.main(["--resume", "mapped", "--max_steps", "40"]) == 0
    assert train.main(["--resume", "held", "--max_steps", "40"]) == 0
    for name in (BEST, LAST):
        assert Path("held", name).read_bytes() == Path("mapped", name).read_bytes()
    assert os.listdir("out") == ["texts"]
