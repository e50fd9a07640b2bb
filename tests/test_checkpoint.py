"""What is saved comes back; what is damaged or strange is refused in a sentence."""

import contextlib
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

import checkpoint
from checkpoint import (
    BEST,
    LAST,
    LOG,
    METADATA,
    Checkpoint,
    find_run,
    load_checkpoint,
    load_model,
    lock_run,
    newest_run,
    optimizer_tensors,
    read_log,
    restore_optimizers,
    save_checkpoint,
    write_log,
)
from data import Vocabulary
from model import GPT, GPTConfig
from optimizer import OptimizerConfig, make_optimizers


def test_file_is_synced_where_the_disks_own_cache_cannot_be(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    # No file system knows this one, as some do not know that of macOS.
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 2**20, raising=False)
    checkpoint.write_whole(Path("a"), b"whole")
    assert Path("a").read_bytes() == b"whole"


def make_checkpoint() -> Checkpoint:
    vocabulary = Vocabulary.of('naïve 李雷\n\0"\\')
    model = GPT(GPTConfig(4, 1, 1, 4), len(vocabulary))
    return Checkpoint(
        model,
        vocabulary,
        {"paths": ["a b.txt"], "sha256": "0", "characters": 7},
        {"train": {"seed": 1}},
    )


def rewrite(path: Path, change) -> None:
    """Change the record of a checkpoint and write it as it would be otherwise."""
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads(file.metadata()[METADATA])
    tensors = safetensors.torch.load_file(path)
    change(record, tensors)
    safetensors.torch.save_file(tensors, path, {METADATA: json.dumps(record)})


def test_everything_comes_back():
    saved = make_checkpoint()
    saved.progress.best_loss = 1 / 3
    saved.average = GPT(saved.model.config, len(saved.vocabulary))
    saved.optimizer = {"head.weight.exp_avg": torch.rand(3)}
    save_checkpoint(Path("a"), saved)
    loaded = load_checkpoint(Path("a"))
    assert loaded.model.config == saved.model.config
    assert loaded.vocabulary.characters == saved.vocabulary.characters
    assert (loaded.text, loaded.settings) == (saved.text, saved.settings)
    assert loaded.progress == saved.progress
    torch.testing.assert_close(loaded.optimizer, saved.optimizer, rtol=0, atol=0)
    for one, other in ((loaded.model, saved.model), (loaded.average, saved.average)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded.model(ids), saved.model(ids))


def test_loaded_model_can_be_trained():
    save_checkpoint(Path("a"), make_checkpoint())
    model, _ = load_model("a")
    model(torch.tensor([[0, 1]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_one_file_is_enough_anywhere(trained):
    os.rename(f"{trained}/{BEST}", "shared.safetensors")
    model, vocabulary = load_model("shared.safetensors")
    assert model.vocab_size == len(vocabulary)


def test_equal_checkpoints_are_equal_files():
    saved = make_checkpoint()
    save_checkpoint(Path("a"), saved)
    save_checkpoint(Path("b"), load_checkpoint(Path("a")))
    assert Path("a").read_bytes() == Path("b").read_bytes()
    assert sorted(os.listdir()) == ["a", "b"]


def test_write_that_fails_leaves_the_old_file_and_nothing_else():
    save_checkpoint(Path("a"), make_checkpoint())
    before = Path("a").read_bytes()
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(Path("a"), make_checkpoint())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("a").read_bytes() == before
    assert os.listdir() == ["a"]


class Trap:
    """A pickle that would leave a file behind if anything in it ran."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[: len(data) // 2], "it is damaged, or no checkpoint"),
        (lambda data: b"", "it is damaged, or no checkpoint"),
        (lambda data: data + b"more", "it is damaged, or no checkpoint"),
        (lambda data: b"just a text", "it is damaged, or no checkpoint"),
        (lambda data: pickle.dumps(Trap()), "it is damaged, or no checkpoint"),
        (
            lambda data: safetensors.torch.save({"weight": torch.zeros(2)}),
            "chargpt did not write it",
        ),
    ],
)
def test_damaged_or_foreign_file_is_refused(damage, sentence):
    save_checkpoint(Path("a"), make_checkpoint())
    Path("a").write_bytes(damage(Path("a").read_bytes()))
    with pytest.raises(ValueError, match=f"a cannot be used: {sentence}"):
        load_checkpoint(Path("a"))
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r, t: r.update(format=1), "its format is 1; this version reads 2"),
        (lambda r, t: r.pop("vocabulary"), "damaged"),
        (lambda r, t: r.update(vocabulary="aa"), "different characters"),
        (lambda r, t: r.update(vocabulary=["a"]), "damaged"),
        (lambda r, t: r["model"].update(n_layer=2), "do not have the shapes"),
        (lambda r, t: r["model"].update(n_layer="2"), "n_layer is '2'; it must be a whole number"),
        (lambda r, t: r["model"].update(n_embd=8), "do not have the shapes"),
        (
            lambda r, t: r["model"].update(n_layer=2**30),
            "n_layer is 1073741824; it must be at most",
        ),
        (lambda r, t: r["model"].update(n_embd=2**30, block_size=2**30), "too large for any mem"),
        (lambda r, t: r.update(vocabulary="a" * 2**21), "needs different characters"),
        (lambda r, t: r.update(settings={"a": ["x" * 2**24]}), "damaged, or no checkpoint"),
        (lambda r, t: r["text"].update(paths=["x" * 5000]), "a path longer than any"),
        (lambda r, t: r["progress"].update(windows=0), "windows is 0"),
        (lambda r, t: r["model"].pop("n_head"), "its model settings are incomplete"),
        (lambda r, t: r.update(format="1" * 10**6), "its format is '1{,300}$"),
        (lambda r, t: r["progress"].update(step=-1), "its steps contradict each other"),
        (lambda r, t: r["progress"].update(best_step=-1), "its steps contradict each other"),
        (lambda r, t: r["progress"].update(loss_count=-1), "its losses contradict each other"),
        (lambda r, t: r.update(progress=[]), "must be a section of keys"),
        (lambda r, t: r["progress"].update(step="5"), "step is '5'; it must be a whole number"),
        (lambda r, t: r.update(text=None), "damaged"),
        (lambda r, t: r["text"].pop("sha256"), "damaged"),
        (lambda r, t: r["text"].update(paths=[1]), "its record of the text is damaged"),
        (lambda r, t: r.update(settings=[1]), "damaged"),
        (lambda r, t: t.pop("head.weight"), "do not have the shapes"),
        (lambda r, t: t.update(other=torch.zeros(1)), "more than a model and its optimizer"),
        (lambda r, t: t.update({"norm.bias": torch.zeros(4).half()}), "not all float32"),
        (lambda r, t: t["norm.bias"].fill_(torch.inf), "its numbers are not all finite"),
    ],
)
def test_record_that_does_not_fit_is_refused(change, sentence):
    save_checkpoint(Path("a"), make_checkpoint())
    rewrite(Path("a"), change)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(Path("a"))


def test_header_has_room_for_every_character():
    characters = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    record = json.dumps({"vocabulary": characters})
    assert len(json.dumps({METADATA: record})) < 0.95 * checkpoint.LONGEST_HEADER


def test_newest_run_is_found_and_a_misspelt_one_is_guessed(book):
    with pytest.raises(FileNotFoundError, match=r"there is no run below .*/out yet"):
        newest_run()
    for name in ("one", "two"):
        Path(f"out/{name}").mkdir(parents=True)
        for file in (BEST, LAST):
            save_checkpoint(Path(f"out/{name}/{file}"), make_checkpoint())
    os.utime(f"out/one/{BEST}", (2e9, 2e9))
    with contextlib.suppress(OSError):  # Windows allows that to some only
        os.symlink("who@where", "out/two/.#log.jsonl")  # an editor's mark on a file that it changes
    assert newest_run() == Path("out/one")
    with pytest.raises(FileNotFoundError, match=r"no run 'out/tow' \(did you mean 'out/two'\?\)"):
        find_run("out/tow")


def test_log_comes_back_without_what_is_no_line_of_it():
    lines = [
        {"step": step, "seconds": step / 10, "sample": "Zoë\u2028\n"}
        | {"training_loss": loss, "validation_loss": 1.0}
        for step, loss in ((0, None), (10, 1.0))
    ]
    write_log(Path(), lines)
    with Path(LOG).open("a", encoding="utf-8") as file:
        file.write(
            "[" * 100_000
            + '\n{"step": 20}\n7\n{"step": "x", "seconds": 1.0, "validation_loss": 1.0}\n{"step": 3'
        )
    assert read_log(Path()) == lines


@pytest.mark.skipif(checkpoint.fcntl is None, reason="no locks on folders")
def test_second_process_cannot_lock_a_run():
    half_written = Path(LAST + ".tmp")
    half_written.touch()
    with lock_run(Path()):
        assert not half_written.exists()
        with pytest.raises(ValueError, match="another process is training in"), lock_run(Path()):
            pass
    with lock_run(Path()):
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.pop("head.bias.exp_avg"),
        lambda tensors: tensors.update({"head.bias.exp_avg": torch.zeros(3)}),
        lambda tensors: tensors.update({"head.tail.exp_avg": torch.zeros(3)}),
    ],
)
def test_optimizer_that_does_not_fit_is_refused(trained, change):
    saved = load_checkpoint(Path(trained, LAST))
    optimizers = make_optimizers(saved.model, OptimizerConfig(), torch.float32)
    restore_optimizers(saved.model, optimizers, saved.optimizer)
    restored = optimizer_tensors(saved.model, optimizers)
    torch.testing.assert_close(restored, saved.optimizer, rtol=0, atol=0)
    change(saved.optimizer)
    with pytest.raises(ValueError, match="does not fit the model"):
        restore_optimizers(saved.model, optimizers, saved.optimizer)


def test_numbers_that_are_not_finite_never_replace_good_ones():
    save_checkpoint(Path("a"), make_checkpoint())
    before = Path("a").read_bytes()
    ruined = make_checkpoint()
    with torch.no_grad():
        ruined.model.head.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="a would hold numbers that are not finite"):
        save_checkpoint(Path("a"), ruined)
    assert Path("a").read_bytes() == before


def test_header_longer_than_any_of_ours_is_not_read():
    with Path("a").open("wb") as file:
        file.write((2**26).to_bytes(8, "little"))
        file.truncate(2**27)
    with pytest.raises(ValueError, match="it is damaged, or no checkpoint"):
        load_checkpoint(Path("a"))
