"""A run learns, can be stopped and gone on with, and is decided by its settings alone."""

import io
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SMALL

import train
import training
from checkpoint import (
    BEST,
    LAST,
    LOG,
    Progress,
    load_checkpoint,
    load_model,
    read_log,
    save_checkpoint,
)
from config import TOO_LARGE
from data import Vocabulary
from data.batches import STRETCH
from run import TrainConfig, choose_preset


def log(run: str) -> list[dict]:
    return read_log(Path(run))


def weights(run: str) -> dict:
    return safetensors.torch.load_file(Path(run, LAST))


def test_heads_need_to_fit_the_preset_only(story):
    Path("long.txt").write_text(5 * story, encoding="utf-8")
    # Of so long a text, auto takes mini, 80 wide; 5 heads do not fit the width of small.
    assert train.main(["long.txt", "--n_head", "5", "--device", "cpu", "--dry_run"]) == 0


@pytest.mark.usefixtures("_as_users_run")
def test_run_learns_what_the_text_is_like(book, story, capsys):
    assert train.main([book, *SMALL, "--max_steps", "300", "--eval_interval", "100"]) == 0
    lines = log("out/book-tiny")
    assert [line["step"] for line in lines] == [0, 100, 200, 300]
    assert lines[0]["validation_loss"] == pytest.approx(math.log(len(set(story))), abs=0.3)
    # Knowing how frequent each character is, but not where it stands, is worth this much.
    counts = torch.tensor([story.count(c) for c in set(story)], dtype=torch.float64)
    unigram = -(counts / len(story) * (counts / len(story)).log()).sum().item()
    assert lines[-1]["validation_loss"] < 0.6 * unigram
    assert lines[-1]["training_loss"] < 0.6 * unigram
    printed = capsys.readouterr().out
    assert (
        f"book, 1 file in utf_8: {len(story):,} characters, {len(set(story))} different" in printed
    )
    assert "parameters" in printed
    own = min(line["validation_loss"] for line in lines) / math.log(2)
    said = re.search(r"trigram ([\d.]+), xz [\d.]+; this model ([\d.]+), (\d+)% below tri", printed)
    assert float(said[2]) == pytest.approx(own, abs=0.001)
    assert int(said[3]) == pytest.approx(100 * (1 - own / float(said[1])), abs=1)
    assert "device   " in printed
    assert "picture of it:  out/book-tiny/curve.svg\n" in printed
    assert Path("out/book-tiny/curve.svg").read_bytes().startswith(b"<?xml")
    assert "python sample.py out/book-tiny\n" in printed
    assert "python train.py --resume out/book-tiny --max_steps 600\n" in printed


@pytest.fixture
def noise() -> str:
    """In noise there is nothing to learn but the noise itself, which makes validation worse."""
    noise = "".join(random.Random(1).choices("abcdefgh", k=400))
    Path("book.txt").write_text(noise)
    return noise


TO_OVERFIT = ["book.txt", *SMALL, "--n_embd", "32", "--max_steps", "300", "--eval_interval", "30"]


def test_best_is_kept_besides_last(noise, capsys):
    assert train.main(TO_OVERFIT) == 0
    lines = log("out/book-tiny")
    best = min(lines, key=lambda line: line["validation_loss"])
    assert 0 < best["step"] < 300
    assert best["validation_loss"] < lines[-1]["validation_loss"] - 0.1
    saved = load_checkpoint(Path("out/book-tiny", BEST))
    assert (saved.progress.best_step, saved.progress.best_loss) == (
        best["step"],
        best["validation_loss"],
    )
    validation = saved.vocabulary.encode(noise)[360:]
    assert train.evaluate(saved.model, validation, torch.float32) == best["validation_loss"]
    # One evaluation after the best may be chance; two are said, once.
    later = sum(line["step"] > best["step"] for line in lines)
    printed = capsys.readouterr().out
    assert later > 2
    assert printed.count(f"overfitting since step {best['step']}: ") == 1
    assert f"more steps will hardly help, as it overfits since step {best['step']};" in printed
    assert "--resume" not in printed


def test_overfitting_is_said_at_the_first_evaluation_that_shows_it():
    training_losses = [1.0, 1.1, 1.01, 0.9, 0.8]  # from the best on; validation is worse after it
    lines = [{"step": step, "training_loss": loss} for step, loss in enumerate(training_losses, 1)]
    progress = Progress(step=5, best_loss=2.0, best_step=1)
    said = [
        train.signs_of_overfitting(SimpleNamespace(progress=progress, log=lines[:n]))
        == [lines[n - 1]]
        for n in range(1, 6)
    ]
    assert said == [False, False, False, True, False]


def test_run_that_still_learns_is_not_said_to_overfit(book, capsys):
    assert train.main([book, *SMALL, "--max_steps", "100", "--eval_interval", "25"]) == 0
    printed = capsys.readouterr().out
    assert "overfit" not in printed
    assert "go on with it:  python train.py --resume out/book-tiny --max_steps 200\n" in printed


def test_patience_ends_a_run_that_gains_nothing(noise, capsys):
    assert train.main([*TO_OVERFIT, "--patience", "2"]) == 0
    steps = [line["step"] for line in log("out/book-tiny")]
    best = load_checkpoint(Path("out/book-tiny", BEST)).progress.step
    assert steps == list(range(0, best + 61, 30))
    printed = capsys.readouterr().out
    assert f"stopped early at step {best + 60}: no gain since step {best}" in printed
    assert f"more steps will hardly help, as it overfits since step {best};" in printed
    with pytest.raises(SystemExit):
        train.main(["--resume", "out/book-tiny"])
    assert (
        "stopped early, no better than at step 30; to go on, give a larger --patience than 2"
        in capsys.readouterr().err
    )
    assert train.main(["--resume", "out/book-tiny", "--patience", "4"]) == 0
    best = load_checkpoint(Path("out/book-tiny", BEST)).progress.step
    assert log("out/book-tiny")[-1]["step"] == min(best + 120, 300)


def test_run_that_is_out_of_patience_by_chance_perhaps_is_told_how_to_go_on(noise, capsys):
    # One evaluation without gain is no sign of overfitting yet.
    assert train.main([*TO_OVERFIT, "--patience", "1"]) == 0
    assert "python train.py --resume out/book-tiny --patience 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("paths", "val_text", "command"),
    [
        (["a b", "c"], "d", "python train.py --resume out/run"),
        (["a b", "-"], "d", "... | python train.py 'a b' - --resume out/run"),
        (["a b"], "-", "... | python train.py --resume out/run --val_text -"),
    ],
)
def test_command_to_resume_names_what_came_from_a_pipe(paths, val_text, command):
    text_config = SimpleNamespace(val_text=val_text)
    run = SimpleNamespace(folder=Path("out/run"), paths=paths, text_config=text_config)
    assert train.command_to_resume(run) == command


def test_text_from_a_pipe_has_to_come_again(story, monkeypatch, capsys):
    words = [*SMALL, "--max_steps", "2"]
    for run in (["-", *words], ["-", "--resume", "out/stdin-tiny", "--max_steps", "4"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(story.encode())))
        assert train.main(run) == 0
        step = 2 * int(run[-1])
        command = f"... | python train.py - --resume out/stdin-tiny --max_steps {step}\n"
        assert f"go on with it:  {command}" in capsys.readouterr().out


def test_run_that_is_out_of_patience_at_its_end_is_told_so(book, capsys):
    # The first step is the best that such a rate allows.
    words = ["--max_steps", "2", "--eval_interval", "1", "--learning_rate", "9", "--patience", "1"]
    assert train.main([book, *SMALL, *words]) == 0
    more = ["--resume", "out/book-tiny", "--max_steps", "4", "--patience", "2"]
    assert f"go on with it:  python train.py {' '.join(more)}\n" in capsys.readouterr().out
    assert train.main(more) == 0


@pytest.mark.usefixtures("_as_users_run")
@pytest.mark.parametrize(
    ("words", "sent", "code"),
    [
        (["--dtype", "float32"], signal.SIGINT, 130),
        # Enough for two threads, each with half of a batch.
        (["--dtype", "bfloat16", "--batch_size", "256", "--dropout", "0.1"], signal.SIGTERM, 143),
    ],
)
def test_stopped_and_resumed_run_is_the_run_that_was_never_stopped(book, words, sent, code):
    words = [book, *SMALL, *words, "--max_steps", "240", "--eval_interval", "40"]
    assert train.main([*words, "--out", "out/whole"]) == 0
    script = [sys.executable, train.__file__, *words, "--out", "out/stopped"]
    # The steps depend on nothing but the settings, so it does not matter where the signal comes.
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        next(line for line in process.stdout if line.startswith("step 40 of"))
        process.send_signal(sent)
        printed = process.stdout.read()
    assert process.returncode == code
    assert "python train.py --resume out/stopped\n" in printed
    stopped = load_checkpoint(Path("out/stopped", LAST)).progress
    assert 40 <= stopped.step < 240
    assert train.main(["--resume", "out/stopped"]) == 0
    for name in (BEST, LAST):
        assert Path("out/whole", name).read_bytes() == Path("out/stopped", name).read_bytes()
    names = ["best.safetensors", "curve.svg", "last.safetensors", "log.jsonl"]
    assert sorted(os.listdir("out/stopped")) == names
    without_times = [
        [line | {"seconds": 0} for line in log(f"out/{run}")] for run in ("whole", "stopped")
    ]
    assert without_times[0] == without_times[1]
    seconds = [line["seconds"] for line in log("out/stopped")]
    assert seconds == sorted(seconds)


def test_evaluation_does_not_change_the_weights(book):
    for interval in ("10", "100"):
        words = [book, *SMALL, "--dropout", "0.1", "--max_steps", "50", "--out", interval]
        assert train.main([*words, "--eval_interval", interval]) == 0
    for name, tensor in weights("10").items():
        assert torch.equal(tensor, weights("100")[name])


def test_kept_weights_are_the_average_and_not_the_last(book):
    assert train.main([book, *SMALL, "--max_steps", "60"]) == 0
    best, last = (load_checkpoint(Path("out/book-tiny", name)) for name in (BEST, LAST))
    assert best.progress.step == last.progress.step == 60
    for name, kept in best.model.state_dict().items():
        assert torch.equal(kept, last.average.state_dict()[name])
        assert not torch.equal(kept, last.model.state_dict()[name])


def test_seed_decides_the_weights(book):
    for seed, out in [("1", "a"), ("1", "b"), ("2", "c")]:
        assert train.main([book, *SMALL, "--max_steps", "5", "--seed", seed, "--out", out]) == 0
    first, same, other = (weights(out)["head.weight"] for out in "abc")
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_lower_precision_rounds_the_arithmetic_but_not_the_weights(book):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        words = [book, *SMALL, "--dtype", dtype, "--max_steps", "100", "--out", dtype]
        assert train.main(words) == 0
        losses[dtype] = log(dtype)[-1]["validation_loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.1)
    assert losses["bfloat16"] != losses["float32"]
    head = weights("bfloat16")["head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())


@pytest.mark.parametrize(("end", "logged"), [(20, [0, 10, 20]), (25, [0, 10, 20, 25])])
def test_finished_run_goes_on_when_told_to(book, capsys, end, logged):
    words = [book, *SMALL, "--max_steps", str(end), "--eval_interval", "10"]
    assert train.main([*words, "--out", "out/a"]) == 0
    before = log("out/a")
    assert [line["step"] for line in before] == logged
    assert train.main(["--resume", "out/a", "--max_steps", "42"]) == 0
    assert [line["step"] for line in log("out/a")] == [*logged, 30, 40, 42]
    assert log("out/a")[: len(logged)] == before
    printed = capsys.readouterr().out
    assert f"\nread: {4 * 8 * end} characters in " in printed
    assert f"resumed  out/a at step {end}" in printed
    assert f"\nread since step {end}: {4 * 8 * (42 - end)} characters in " in printed


def test_longer_run_is_evaluated_as_rarely_as_a_new_one(book):
    assert train.main([book, *SMALL, "--max_steps", "20"]) == 0
    assert train.main(["--resume", "out/book-tiny", "--max_steps", "2000"]) == 0
    assert len(log("out/book-tiny")) < 30


def test_what_a_resumed_run_changes_holds_before_its_next_save(trained, monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    # The bar is the first thing that training makes.
    monkeypatch.setattr(train, "tqdm", interrupt)
    for words in (["--max_steps", "50"], ["--patience", "5"]):
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", trained, *words])
    saved = load_checkpoint(Path(trained, LAST))
    settings = saved.settings["train"]
    assert (saved.progress.step, settings["max_steps"], settings["patience"]) == (20, 50, 5)


@pytest.mark.parametrize("log_is_lost", [False, True])
def test_steps_after_the_last_evaluation_have_taken_time(trained, log_is_lost):
    if log_is_lost:
        Path(trained, LOG).unlink()
    last = Path(trained, LAST)
    saved = load_checkpoint(last)
    saved.progress.step, saved.progress.evaluated_step = 100_000, 20
    save_checkpoint(last, saved)
    began = time.perf_counter()
    assert train.main(["--resume", trained, "--max_steps", "100001"]) == 0
    # What was not evaluated was far more than what was done since.
    assert log(trained)[-1]["seconds"] > time.perf_counter() - began


def test_run_without_its_best_model_finds_a_new_one(trained):
    saved = load_checkpoint(Path(trained, LAST))
    saved.progress.best_loss = 0.0
    save_checkpoint(Path(trained, LAST), saved)
    Path(trained, BEST).unlink()
    assert load_model(trained)[0].config == saved.model.config
    assert train.main(["--resume", trained, "--max_steps", "21", "--patience", "1"]) == 0
    assert load_checkpoint(Path(trained, BEST)).progress.best_step == 21


def test_run_goes_on_when_its_validation_text_has_moved(book, capsys):
    Path("other.txt").write_bytes(Path(book).read_bytes())
    words = [book, "--val_text", "other.txt", *SMALL, "--max_steps", "2", "--out", "run"]
    assert train.main(words) == 0
    os.rename("other.txt", "moved.txt")
    with pytest.raises(SystemExit):
        train.main(["--resume", "run", "--max_steps", "3"])
    assert "python train.py TEXT --resume run --val_text OTHER" in capsys.readouterr().err
    words = [book, "--resume", "run", "--val_text", "moved.txt", "--max_steps", "3"]
    assert train.main(words) == 0


def test_run_is_not_validated_on_another_text_when_it_goes_on(trained, book, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", trained, "--val_text", book, "--max_steps", "21"])
    assert "is validated on the end of its own text, which cannot" in capsys.readouterr().err


def test_run_goes_on_when_its_text_has_moved(trained, book):
    os.rename(book, "moved.txt")
    assert train.main(["moved.txt", "--resume", trained, "--max_steps", "21"]) == 0


# The steps that there are without --minutes would take far longer.
SIX_SECONDS = [*SMALL, "--batch_size", "512", "--minutes", "0.1"]


def test_minutes_are_kept_with_the_decay_included(book):
    began = time.perf_counter()
    assert train.main([book, *SIX_SECONDS]) == 0
    assert 3 < time.perf_counter() - began < 30
    saved = load_checkpoint(Path("out/book-tiny", LAST))
    assert saved.progress.step == saved.settings["train"]["max_steps"]


def test_more_minutes_than_a_run_can_have_become_fewer_steps():
    pace = train.Pace(step=1e-3, evaluation=1e-3)
    assert 0 < pace.steps_until(math.inf, eval_interval=10) < TOO_LARGE


def test_minutes_are_kept_even_if_the_rehearsal_was_slow(book, monkeypatch):
    def rehearse_slowly(*arguments, **options):
        pace = rehearse(*arguments, **options)
        return train.Pace(100 * pace.step, 100 * pace.evaluation)

    rehearse = train.rehearse
    monkeypatch.setattr(train, "rehearse", rehearse_slowly)
    began = time.perf_counter()
    assert train.main([book, *SIX_SECONDS]) == 0
    assert 3 < time.perf_counter() - began < 30
    assert len(log("out/book-tiny")) < 30


def test_interval_that_is_asked_for_is_kept(book):
    assert train.main([book, *SMALL, "--minutes", "0.05", "--eval_interval", "30"]) == 0
    steps = [line["step"] for line in log("out/book-tiny")]
    assert len(steps) > 2
    assert steps[:-1] == list(range(0, steps[-1], 30))


def test_evaluations_stay_apart_when_the_interval_grows(book):
    assert train.main([book, *SMALL, "--max_steps", "20", "--eval_interval", "10"]) == 0
    words = ["--resume", "out/book-tiny", "--max_steps", "60", "--eval_interval", "11"]
    assert train.main(words) == 0
    # 22 is a multiple of 11, but it follows closely upon 20.
    assert [line["step"] for line in log("out/book-tiny")] == [0, 10, 20, 33, 44, 55, 60]


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (-5.0, 0),
        (2.05, 0),
        (2.15, 1),
        (3.05, 10),  # one evaluation, at the end
        (5.05, 10),  # an eleventh step would need another one
        (5.15, 11),
        (30.05, 100),
    ],
)
def test_steps_fit_before_the_deadline_with_their_evaluations(monkeypatch, seconds, steps):
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    pace = train.Pace(step=0.1, evaluation=2.0)
    assert pace.steps_until(100.0 + seconds, eval_interval=10) == steps


@pytest.mark.parametrize(
    ("step", "due", "seconds", "max_steps"),
    [
        (40, False, 15.0, 40),  # the evaluation at the end needs most of that
        (40, False, 24.5, 52),
        (30, True, 15.0, 30),  # after the one that is due, another one would not fit
        (30, True, 27.5, 33),
    ],
)
def test_time_for_the_last_evaluation_is_left(monkeypatch, step, due, seconds, max_steps):
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    run = SimpleNamespace(
        progress=Progress(step=step, eval_interval=30),
        config=TrainConfig(max_steps=40, eval_interval=30),
    )
    pace = train.Pace(step=1.0, evaluation=12.0)
    train.correct_plan(run, pace, 100.0 + seconds, taken=step, training=float(step), due=due)
    assert run.config.max_steps == max_steps


def test_minutes_of_a_preset_yield_to_max_steps(book):
    Path("timed.toml").write_text("[train]\nminutes = 5\n")
    assert train.main([book, "--preset", "timed.toml", "--n_embd", "8", "--max_steps", "2"]) == 0
    assert load_checkpoint(Path("out/book-timed", LAST)).progress.step == 2


@pytest.mark.parametrize("eval_interval", ["1", "7", "20"])
def test_loss_that_is_no_number_stops_the_run(book, capsys, eval_interval):
    words = [book, *SMALL, "--learning_rate", "1e30", "--max_steps", "20"]
    words += ["--eval_interval", eval_interval]
    assert train.main(words) == 1
    error = capsys.readouterr().err
    assert "the loss or its gradient is not a number any more" in error
    assert "--learning_rate 3.3e+29" in error
    for name in (BEST, LAST):
        model = load_checkpoint(Path("out/book-tiny", name)).model
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_short_text_trains_with_a_smaller_context(capsys):
    Path("short.txt").write_text("to be, or not to be: that", encoding="utf-8")
    assert train.main(["short.txt", "--preset", "mini", "--max_steps", "3"]) == 0
    assert "so the context shrinks from 64 to 11 characters" in capsys.readouterr().out
    assert load_checkpoint(Path("out/short-mini", BEST)).model.config.block_size == 11


@pytest.mark.parametrize(
    ("device", "n_characters", "preset"),
    [
        ("cpu", 1000, "tiny"),
        ("cpu", 10**5, "mini"),
        ("cpu", 10**6, "small"),
        ("cuda", 1000, "tiny"),
        ("cuda", 10**5, "medium"),
        ("cuda", 10**6, "base"),
    ],
)
def test_auto_chooses_by_device_and_length_of_text(device, n_characters, preset):
    assert choose_preset(torch.device(device), n_characters)[0] == preset


def test_auto_does_not_count_what_is_only_validated_on(book, capsys):
    Path("long.txt").write_text("Ada sees Bo.\n" * 30_000)
    assert train.main([book, "--val_text", "long.txt", "--dry_run", "--device", "cpu"]) == 0
    assert "\npreset   tiny: " in capsys.readouterr().out


def test_auto_reads_a_short_text_thirty_times_if_nothing_else_is_said(book, story, capsys):
    def plan(*words: str) -> str:
        assert train.main([book, "--dry_run", "--device", "cpu", *words]) == 0
        return re.search(r"^plan     (about )?([\d,]+) steps", capsys.readouterr().out, re.M)[2]

    n_training = len(story) * 9 // 10
    enough = math.ceil(30 * n_training / (32 * 8))
    assert plan() == f"{enough:,}"
    # In fewer than this, the learning rates hardly rise.
    assert plan("--batch_size", "512") == "200"
    assert plan("--block_size", "4") == f"{math.ceil(30 * n_training / (32 * 4)):,}"
    assert plan("--max_steps", "5000") == "5,000"
    assert plan("--preset", "tiny") == plan("--dropout", "0.2") == "10,000"
    assert int(plan("--minutes", "1").replace(",", "")) > enough


def test_run_is_compared_with_the_best_of_the_models_that_count(capsys):
    draw = random.Random(1)
    text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=3000))
    Path("noise.txt").write_text(text)
    assert train.main(["noise.txt", *SMALL, "--max_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"bits .*; this model [\d.]+, \d+% (above|below) unigram and ", said)


def test_bits_per_byte_are_those_of_characters_by_their_bytes(book, story, capsys):
    assert train.main([book, *SMALL, "--max_steps", "1"]) == 0
    said = capsys.readouterr().out
    own = float(re.search(r"; this model ([\d.]+), ", said)[1])
    per_byte = float(re.search(r"bits per byte, to compare languages: ([\d.]+)", said)[1])
    # The first character of the validation part is not predicted.
    predicted = story[len(story) * 9 // 10 + 1 :]
    n_bytes = len(predicted.encode())
    assert n_bytes > len(predicted)
    assert per_byte == pytest.approx(own * len(predicted) / n_bytes, abs=0.001)


def test_vocabulary_of_a_run_is_that_of_its_text(trained, story):
    assert load_checkpoint(Path(trained, BEST)).vocabulary.characters == (
        Vocabulary.of(story).characters
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.4, "4 s"), (99, "99 s"), (200, "3 min 20 s"), (18600, "5 h 10 min")]
)
def test_durations_are_written_for_people(seconds, words):
    assert train.readable_time(seconds) == words


def test_dry_run_tells_what_to_expect_and_writes_nothing(book, capsys):
    assert train.main([book, *SMALL, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for word in ("text", "preset", "model", "device", "plan", "time", "memory", "rarest", "lines"):
        assert f"\n{word} " in f"\n{printed}"
    assert "bits per character, the fewer the better: uniform 4.170, " in printed
    assert "nothing was trained" in printed
    assert os.listdir() == ["book.txt"]


def test_dry_run_of_a_text_that_has_a_run(trained, capsys):
    assert train.main(["book.txt", *SMALL, "--dry_run", "--out", trained]) == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_dry_run_of_a_run_to_go_on_with_changes_nothing_in_it(trained, capsys):
    with Path(trained, LOG).open("a", encoding="utf-8") as file:
        file.write("what came after the last save\n")
    before = {path: path.read_bytes() for path in Path(trained).iterdir()}
    assert train.main(["--resume", trained, "--max_steps", "30", "--dry_run"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path(trained).iterdir()} == before


def test_what_is_said_of_a_short_text_and_of_one_to_validate_on(book, story, capsys):
    Path("more.txt").write_text("Ada sees Bo.\n" * 2)
    words = ["more.txt", "--val_text", book, *SMALL, "--max_steps", "500", "--dry_run"]
    assert train.main(words) == 0
    printed = capsys.readouterr().out
    n = len(story)
    assert f"{n + 26:,} characters, the last {n:,} of them to validate on, " in printed
    assert "warning: a text that is read so often is learned by heart" in printed


def test_long_validation_part_is_measured_as_its_stretches_alone(book, story, monkeypatch, capsys):
    for module in (train, training):
        monkeypatch.setattr(module, "EVALUATED_CHARACTERS", STRETCH)
    # Of so long a text, the first stretch is read.
    Path("long.txt").write_text(story, encoding="utf-8")
    Path("first.txt").write_text(story[:STRETCH], encoding="utf-8")
    said = []
    for name in ("long", "first"):
        words = [book, "--val_text", f"{name}.txt", *SMALL, "--max_steps", "2", "--out", name]
        assert train.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        said.append([line for line in lines if line.startswith("bits per ")])
    assert len(said[0]) == 2
    assert said[0] == said[1]


def test_unknown_character_is_learned_from_but_never_written(book, capsys):
    words = [book, *SMALL, "--min_count", "180", "--max_steps", "5", "--eval_interval", "1"]
    assert train.main(words) == 0
    vocabulary = load_checkpoint(Path("out/book-tiny", BEST)).vocabulary
    assert "\ufffd" in vocabulary.characters
    assert not {"r", "p"} & set(vocabulary.characters)  # each in a verb of three
    # One character of 15 would otherwise be in every sample of 200, untrained as the model is.
    assert not any("\ufffd" in line["sample"] for line in log("out/book-tiny"))
