"""Comparisons train what is missing, go on where they stopped, and say what cannot be compared."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import sample
import train
import training
from checkpoint import BEST, LAST, load_checkpoint, load_model, read_log, save_checkpoint
from compare import SAID
from model import GPTConfig


def everything() -> dict[Path, int]:
    """All files, with when they were changed, and folders."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}


NARROW = ["--n_embd", "16", "--batch_size", "4", "--device", "cpu"]
TWO = ["book.txt", "--chars", "4000", *NARROW, "--presets", "tiny", "deep.toml"]
THREE = [*TWO, "wild.toml"]
# What a clock decides differs from one comparison to the next.
TIMED = {"characters_per_second", "written_per_second"}


def table(folder: str = "out/compare-book") -> list[dict]:
    with Path(folder, "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def write_presets() -> None:
    Path("deep.toml").write_text("[model]\nn_layer = 2\nblock_size = 16\n")
    Path("wild.toml").write_text("[optimizer]\nmuon_learning_rate = 1e30\nlearning_rate = 1e30\n")


@pytest.fixture(scope="module")
def _compared_once(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("book.txt").write_text(story, encoding="utf-8")
        write_presets()
        assert compare.main(THREE) == 0
    return folder


@pytest.fixture
def compared(book, _compared_once) -> Path:
    """The folder of a comparison of three presets, one of which cannot learn."""
    write_presets()
    shutil.copytree(_compared_once / "out", "out")
    return Path("out/compare-book")


def test_comparison(compared, capsys):
    rows = {row["preset"]: row for row in table()}
    simple = {"uniform", "unigram", "bigram", "trigram", "xz"}
    assert set(rows) == {"tiny", "deep", "wild"} | simple
    assert "best" in {rows["tiny"]["verdict"], rows["deep"]["verdict"]}
    assert rows["wild"]["verdict"] == "failed"
    assert "is not a number any more" in rows["wild"]["failure"]
    for name, context in [("tiny", 8), ("deep", 16)]:
        run = compared / f"{name}-4000chars-seed1"
        log, last = read_log(run), load_checkpoint(run / LAST)
        assert last.progress.step == -(-4000 // (4 * context))
        assert float(rows[name]["loss"]) == last.progress.best_loss
        assert int(rows[name]["characters"]) == last.progress.step * 4 * context
        assert int(rows[name]["context"]) == context
        assert len(log) >= 2
        assert "plan     " in (run / "train.txt").read_text(encoding="utf-8")
        # They are runs like any other.
        assert sample.main([str(run), "--length", "20", "--seed", "1"]) == 0
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "python compare.py book.txt --chars 4000 --n_embd 16" in page
    assert not list(compared.rglob("*.tmp"))


def test_what_is_trained_is_not_trained_again(compared, capsys):
    before = table()
    # What has failed is tried again.
    trained = [path for path in compared.rglob("*.safetensors") if "wild" not in str(path)]
    saved_at = [path.stat().st_mtime_ns for path in trained]
    (compared / "comparison.csv").unlink()
    assert compare.main(THREE) == 0
    assert table() == before
    assert [path.stat().st_mtime_ns for path in trained] == saved_at
    printed = capsys.readouterr().out
    assert "| tiny " in printed
    assert "wild-4000chars-seed1 failed: at step" in printed


def test_comparison_that_is_stopped_and_killed_comes_to_the_same_table(compared):
    complete = [row for row in table() if row["preset"] != "wild"]
    (compared / "comparison.csv").unlink()
    run = compared / "deep-4000chars-seed1"
    shutil.rmtree(run)
    # Stopped when a run has just begun, killed when it is about to train.
    for number, sign in [(signal.SIGTERM, SAID), (signal.SIGKILL, LAST)]:
        words = [sys.executable, compare.__file__, *TWO]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while not (run / sign).exists():
                assert process.poll() is None
            process.send_signal(number)
            _, said = process.communicate()
        finally:
            process.kill()
        if number == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert "stopped; the same command goes on from here" in said.decode()
        assert not (compared / "comparison.csv").exists()
    # Nobody has told the run that its comparison was killed: it still goes on, and is waited for.
    assert compare.main(TWO) == 0
    assert table() == complete


def train_and_stop(words: list[str], step: int) -> None:
    """Begin a run and stop it after a step."""
    draw_starts = training.draw_starts

    def draw_and_stop(*arguments):
        if arguments[-1] == step:
            signal.raise_signal(signal.SIGTERM)
        return draw_starts(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_starts", draw_and_stop)
        assert train.main(words) == 128 + signal.SIGTERM


def test_run_that_was_stopped_goes_on(compared):
    complete = [row for row in table() if row["preset"] != "wild"]
    run = compared / "deep-4000chars-seed1"
    asked = load_checkpoint(run / LAST).settings["train"]
    shutil.rmtree(run)
    words = ["book.txt", *NARROW, "--preset", "deep.toml", "--out", str(run), "--max_steps", "63"]
    train_and_stop([*words, f"--eval_interval={asked['eval_interval']}"], 30)
    assert load_checkpoint(run / LAST).progress.step == 31
    assert compare.main(TWO) == 0
    assert "resumed " in (run / SAID).read_text(encoding="utf-8")
    assert table() == complete


def test_best_model_that_is_untrained_is_not_used(book, capsys):
    run = "out/stopped"
    words = [book, *NARROW, "--preset", "tiny", "--out", run, "--max_steps", "99"]
    train_and_stop([*words, "--eval_interval", "99"], 30)
    assert load_checkpoint(Path(run, BEST)).progress.step == 0
    model, _ = load_model(run)
    average = load_checkpoint(Path(run, LAST)).average
    assert torch.equal(model.head.bias, average.head.bias)
    with pytest.raises(SystemExit) as error:
        compare.main([book, "--presets", run])
    assert error.value.code == 2
    assert f"{run} holds a run that has not been evaluated yet" in capsys.readouterr().err


def test_finished_runs_are_measured_only(compared, trained_beside, capsys):
    run = "out/compare-book/tiny-4000chars-seed1"
    before = (Path(run) / LAST).read_bytes()
    assert compare.main(["book.txt", "--presets", run, trained_beside, "--out", "out/two"]) == 0
    names = [row["preset"] for row in table("out/two")][:2]
    assert names == ["tiny-4000chars-seed1", "trained"]
    assert (Path(run) / LAST).read_bytes() == before
    # The same run has the same loss in whatever company.
    (alone,) = (row["loss"] for row in table() if row["preset"] == "tiny")
    assert table("out/two")[0]["loss"] == alone
    assert sorted(path.name for path in Path("out/two").iterdir()) == [
        "comparison.csv",
        "losses.svg",
        "report.html",
    ]


@pytest.fixture
def trained_beside(_trained_once) -> str:
    shutil.copytree(_trained_once / "out/trained", "out/trained")
    return "out/trained"


def test_seeds(compared, capsys):
    words = ["book.txt", "--presets", "tiny", "--chars", "4000", "--seeds", "2"]
    assert compare.main([*words, *NARROW]) == 0
    runs = [compared / f"tiny-4000chars-seed{seed}" for seed in (1, 2)]
    first, second = (load_checkpoint(run / LAST).progress.best_loss for run in runs)
    assert first != second
    (row,) = (row for row in table() if row["preset"] == "tiny")
    assert row["seeds"] == "2"
    assert float(row["loss"]) == pytest.approx((first + second) / 2, rel=1e-6)
    assert "| tiny, 2 seeds |" in capsys.readouterr().out


def test_run_that_cannot_be_measured_is_missing_from_its_row_only(compared, capsys):
    # What had been trained is damaged behind the comparison's back.
    Path(compared, "deep-4000chars-seed1", BEST).write_bytes(b"damaged")
    assert compare.main(TWO) == 0
    rows = {row["preset"]: row for row in table()}
    assert rows["tiny"]["verdict"] == "best"
    assert rows["deep"]["failure"].startswith("it could not be measured: ")
    assert "python sample.py out/compare-book/tiny-4000chars-seed1" in capsys.readouterr().out


def test_pictures_that_cannot_be_drawn_are_all_that_is_missing(compared, monkeypatch, capsys):
    # That is how Python remembers what cannot be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare.main(TWO) == 0
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "The losses could not be drawn: ModuleNotFoundError(" in page
    assert "write with it:   python sample.py" in capsys.readouterr().out
    assert not (compared / "losses.svg").exists()


def test_folder_around_the_comparison_stays_the_same_text(book, tmp_path, capsys):
    words = [".", "--presets", "tiny", "--chars", "600", *NARROW]
    Path("book.txt").rename("only.txt")
    assert compare.main(words) == 0
    (csv_file,) = Path("out").glob("compare-*/comparison.csv")
    before = csv_file.read_text()
    assert compare.main(words) == 0
    strip = [line.split(",")[:5] for line in before.splitlines()]
    assert [line.split(",")[:5] for line in csv_file.read_text().splitlines()] == strip


def test_flops_are_those_of_the_matrix_products():
    config = GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=4)
    # Forward, each of T characters: Q, K, V and projection 4 C C, up and down 8 C C, scores and
    # their products with V 2 T C, head V C; each a multiplication and an addition. Backward twice.
    C, T, V = 4, 8, 10
    forward = 2 * (2 * (4 * C * C + 8 * C * C + 2 * T * C) + V * C)
    assert compare.flops_per_character(config, V) == 3 * forward


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--presets", "tiny", "--minutes", "1", "--chars", "5"], "--minutes and --chars each say"),
        (["--presets", "tiny", "--max_steps", "5"], "--max_steps would give presets different"),
        (["--presets", "tiny", "--patience", "5"], "--patience would give presets different"),
        (["--presets", "smal"], "no preset 'smal' (did you mean small?); choose from tiny, mini"),
        (["--presets", "tiny", "--val_text", "b", "--val_fraction", "0.2"], "both say what to"),
        (["--presets", "auto"], "auto stands for one of the presets; name some of tiny"),
        (["--presets", "tiny", "tiny"], "two presets are called tiny"),
        (["--presets", "out/trained", "x/trained"], "two presets are called trained"),
        (["--presets", "tiny", "book.txt"], "book.txt is a file; texts come before --presets"),
        (["--presets", "shorter.toml"], "shorter.toml has a section [text]"),
        (["--presets", "missing.toml"], "there is no preset file missing.toml"),
        (["--presets", "out/missing"], "there is no run 'out/missing'"),
        (["--presets", "out/other"], "out/other was trained on another text than book"),
        (["--presets", "out/trained", "--val_fraction", "0.2"], "was trained with val_fraction"),
        (["--presets", "patient.toml"], "patient.toml sets patience"),
        (["--presets", "tiny", "--chars", "0"], "chars is 0; it must be at least 1"),
        (["--presets", "tiny", "--flops", "-3"], "flops is -3; it must be at least 1"),
        (["--presets", "tiny", "--seeds", "0"], "seeds is 0; it must be from 1 to 100"),
        (["--presets", "tiny", "--n_layer", "0"], "n_layer is 0; it must be at least 1"),
        (["--presets"], "argument --presets: expected at least one argument"),
        ([], "it is not said what to compare; name some, as in --presets tiny mini"),
        (["--preset", "tiny"], "no use for '--preset' (did you mean --presets?)"),
        (["missing.txt", "--presets", "tiny"], "there is no file or folder 'missing.txt'"),
        # A text may be long, so it is read after the presets are looked up.
        (["missing.txt", "--presets", "smal"], "no preset 'smal' (did you mean small?)"),
        (["missing.txt", "--presets", "out/missing"], "there is no run 'out/missing'"),
    ],
)
def test_bad_input_gets_a_sentence(book, trained_beside, story, capsys, words, says):
    Path("patient.toml").write_text("[train]\npatience = 3\n")
    Path("shorter.toml").write_text("[text]\nval_fraction = 0.2\n")
    shutil.copytree("out/trained", "x/trained")
    if "out/other" in words:
        shutil.move("out/trained", "out/other")
        Path("book.txt").write_text(story + "And so on.\n", encoding="utf-8")
    before = everything()
    with pytest.raises(SystemExit) as error:
        compare.main(words if "missing.txt" in words else ["book.txt", *words])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("compare.py: ")
    assert said.count("\n") == 1
    assert everything() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipe_is_refused(capsys):
    os.mkfifo("pipe.txt")
    # What was written stays in the pipe for as long as someone holds it open.
    holder = os.open("pipe.txt", os.O_RDONLY | os.O_NONBLOCK)
    Path("pipe.txt").write_text("a few words" * 99)
    with pytest.raises(SystemExit) as error:
        compare.main(["pipe.txt", "--presets", "tiny"])
    os.close(holder)
    assert error.value.code == 2
    assert "so it must be a file, not a pipe" in capsys.readouterr().err
    assert not Path("out").exists()


def test_folder_in_the_text_is_refused(book, capsys):
    Path("texts").mkdir()
    shutil.copy(book, "texts")
    before = everything()
    for words in ["texts"], [book, "--val_text", "texts"]:
        with pytest.raises(SystemExit) as error:
            compare.main([*words, "--presets", "tiny", "--out", "texts/sizes"])
        assert error.value.code == 2
        assert "texts/sizes lies in the text texts; name another" in capsys.readouterr().err
        assert everything() == before


def test_heads_need_to_fit_the_presets_only(book):
    Path("five.toml").write_text("[model]\nn_layer = 1\nn_embd = 20\nblock_size = 8\n")
    words = ["--chars", "600", "--batch_size", "4", "--device", "cpu", "--n_head", "5"]
    assert compare.main([book, *words, "--presets", "five.toml"]) == 0


def test_other_settings_are_refused(compared, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main([*THREE, "--n_layer", "1"])
    assert error.value.code == 2
    assert "tiny-4000chars-seed1 was trained with n_layer 3, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "before", "now"), [("muon_weight_decay", 0.0, 0.1), ("muon_nu", 1.0, 0.85)]
)
def test_what_an_older_version_did_not_save_was_as_it_did_it(compared, key, before, now, capsys):
    path = compared / "tiny-4000chars-seed1" / LAST
    saved = load_checkpoint(path)
    del saved.settings["optimizer"][key]
    save_checkpoint(path, saved)
    with pytest.raises(SystemExit) as error:
        compare.main([*THREE, f"--{key}", str(now)])
    assert error.value.code == 2
    assert f"was trained with {key} {before}, not {now}" in capsys.readouterr().err
