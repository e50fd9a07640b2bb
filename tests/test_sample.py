"""What sample.py prints: the prompt and what the model writes after it."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

import sample
import train
import training
from checkpoint import load_checkpoint
from data.batches import STRETCH


def written(capsys, *words) -> str:
    """What a successful call prints, without the last line break."""
    assert sample.main(list(words)) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_newest_run_is_used_and_its_seed_is_told(trained, capsys):
    assert sample.main(["--length", "30"]) == 0
    first = capsys.readouterr()
    assert len(first.out) == 31
    seed = re.fullmatch(rf"{trained} on \w+ \(.*\), --seed (\d+)\n", first.err)[1]
    assert written(capsys, "--length", "30", "--seed", seed) == first.out.removesuffix("\n")


def test_prompt_comes_first_and_length_counts_what_is_new(trained, capsys):
    text = written(capsys, trained, "--prompt", r"Ada\nBo", "--length", "100", "--seed", "7")
    assert text.startswith("Ada\nBo")
    assert len(text) == len("Ada\nBo") + 100


def test_prompt_may_be_a_file_longer_than_the_context(trained, capsys, story):
    Path("prompt.txt").write_text(story[:300], encoding="utf-8")
    text = written(capsys, trained, "--prompt_file", "prompt.txt", "--length", "40")
    assert text.startswith(story[:300])
    assert len(text) == 340


def test_seed_decides_the_text(trained, capsys):
    one, same, other = (written(capsys, "--seed", seed) for seed in ("7", "7", "8"))
    assert one == same != other


@pytest.mark.parametrize("words", [[], ["--stop", " "], ["--top_k", "3", "--top_p", "0.9"]])
def test_each_of_several_texts_can_be_had_by_itself(trained, monkeypatch, capsys, words):
    # With a context of 8, these are 7, 8 and 9 side by side, then 10 and 11.
    monkeypatch.setattr(sample, "CHARACTERS_AT_ONCE", 24)
    words = ["--length", "50", "--prompt", "Bo", *words]
    together = written(capsys, *words, "--seed", "7", "--num_samples", "5")
    apart = [written(capsys, *words, "--seed", seed) for seed in ("7", "8", "9", "10", "11")]
    assert together.split("\n---\n") == apart
    assert len(set(apart)) == 5


def test_temperature_zero_is_greedy(trained, capsys):
    texts = {written(capsys, "--temperature", "0", "--seed", seed) for seed in ("1", "2")}
    texts.add(written(capsys, "--top_k", "1", "--seed", "3"))
    assert len(texts) == 1


def test_stop_ends_the_text_at_the_string(trained, capsys):
    free = written(capsys, "--seed", "7", "--length", "400")
    stop = free[20:22]
    assert (
        written(capsys, "--seed", "7", "--stop", stop.replace("\n", r"\n"))
        == (free[: free.index(stop) + 2])
    )


def test_unknown_characters_can_be_skipped(trained, capsys):
    text = written(capsys, "--prompt", "Ad%a", "--unknown", "skip", "--length", "1")
    assert text.startswith("Ada")


def test_score_of_the_validation_part_is_that_of_the_run(trained, capsys, story):
    progress = load_checkpoint(Path(trained, "last.safetensors")).progress
    n_training = len(story) * 9 // 10
    Path("rest.txt").write_text(story[n_training:], encoding="utf-8")
    said = written(capsys, trained, "--score", "rest.txt")
    nats, bits, per_byte = map(float, re.findall(r"\d+\.\d{4}", said))
    assert nats == pytest.approx(progress.best_loss, abs=6e-5)
    assert bits == pytest.approx(progress.best_loss / math.log(2), abs=6e-5)
    predicted = story[n_training + 1 :]
    assert per_byte * len(predicted.encode()) == pytest.approx(bits * len(predicted), rel=1e-4)


def test_encoding_of_a_text_to_score_can_be_said(trained, capsys, story):
    line = "Zoë sees Bo.\n"
    Path("utf8.txt").write_text(20 * line, encoding="utf-8")
    Path("other.txt").write_text(20 * line, encoding="cp1252")
    expected = written(capsys, "--score", "utf8.txt")
    assert written(capsys, "--score", "other.txt", "--encoding", "cp1252") == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written_gets_a_sentence(trained):
    command = [sys.executable, sample.__file__, trained, "--length", "50"]
    # What could not be written is tried again at the very end, unless nothing is held back.
    held_back = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=held_back
        )
    assert done.returncode == 2
    assert done.stderr.endswith("sample.py: the system says: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_score_leaves_out_unknown_characters_if_asked(trained, capsys, story):
    Path("known.txt").write_text(story[:500], encoding="utf-8")
    Path("other.txt").write_text("%" + story[:500], encoding="utf-8")
    known = written(capsys, "--score", "known.txt")
    skipped = written(capsys, "--score", "other.txt", "--unknown", "skip")
    assert "; 1 that the model does not know were left out" in skipped
    assert skipped.split(",")[0] == known.split(",")[0]
    assert "per byte" in known
    assert "per byte" not in skipped


def test_stand_in_ends_no_text(book):
    assert train.main(["book.txt", *SMALL, "--min_count", "500", "--max_steps", "2"]) == 0
    with pytest.raises(SystemExit) as exit_:
        sample.main(["--stop", "\ufffd"])
    assert exit_.value.code == 2


def test_score_takes_unknown_characters_as_in_training(book, capsys, story):
    # Its least frequent character comes 450 times or less.
    words = ["book.txt", *SMALL, "--min_count", "500", "--max_steps", "2", "--out", "run"]
    assert train.main(words) == 0
    progress = load_checkpoint(Path("run", "last.safetensors")).progress
    n_training = len(story) * 9 // 10
    Path("rest.txt").write_text(story[n_training:], encoding="utf-8")
    capsys.readouterr()
    said = written(capsys, "run", "--score", "rest.txt")
    assert float(said.split()[0]) == pytest.approx(progress.best_loss, abs=6e-5)
    assert "that the model does not know were taken for the unknown character" in said
    Path("strange.txt").write_text(99 * "%")
    with pytest.raises(SystemExit):
        sample.main(["run", "--score", "strange.txt"])
    assert "has too few characters that the model knows: 0" in capsys.readouterr().err


def test_score_of_a_long_text_is_that_of_a_part(trained, monkeypatch, capsys):
    for module in (sample, training):
        monkeypatch.setattr(module, "EVALUATED_CHARACTERS", STRETCH)
    assert "the mean over 4,095 of 6," in written(capsys, "--score", "book.txt")


def test_copies_are_told(trained, capsys):
    two = ["--seed", "7", "--num_samples", "2", "--prompt", "Ada", "--length", "100"]
    first, second = written(capsys, *two).split("\n---\n")
    Path("one.txt").write_text(first, encoding="utf-8")
    Path("both.txt").write_text(f"{first} {second}", encoding="utf-8")
    Path("other.txt").write_text("\t", encoding="utf-8")
    said = []
    for name in ("one.txt", "both.txt", "other.txt"):
        assert sample.main([*two, "--copied_from", name]) == 0
        said.append(capsys.readouterr().err.splitlines()[-1])
    # The prompt is not counted.
    assert all("of any length, has 100 and begins" in line for line in said[:2])
    assert 50 <= float(re.search(r"copied: (.*?)%", said[0])[1]) < 100
    assert said[1].startswith("copied: 100.0% of what was written")
    assert said[2].startswith("copied: 0.0% of what was written")


@pytest.mark.parametrize(
    ("typed", "meant"), [(r"a\nb", "a\nb"), (r"\\n", r"\n"), (r"\t\x", "\t\\x"), ("é\\", "é\\")]
)
def test_escapes_in_a_prompt(typed, meant):
    assert sample.unescape(typed) == meant


def test_control_characters_do_not_reach_a_terminal(monkeypatch, capsys):
    Path("book.txt").write_text("\x1b]52;c;!\a\x9b2J\t\n" * 20, encoding="utf-8")
    assert train.main(["book.txt", *SMALL, "--max_steps", "1", "--out", "run"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    words = ["run", "--prompt", "\x1b\x9b", "--length", "200"]
    assert sample.main(words) == 0
    assert "\x1b" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("␛\ufffd")
    assert {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160} <= set("\t\n")
