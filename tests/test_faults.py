"""What can go wrong in a run is said in a sentence, and costs nothing that was saved."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import SMALL, train_in

import graphs
import run
import train
import training
from checkpoint import BEST, LAST, load_checkpoint, read_log
from data import draw_starts
from model import GPT

pty = pytest.importorskip("pty", reason="terminals, signals and limits as on Unix")
resource = pytest.importorskip("resource", reason="terminals, signals and limits as on Unix")

RUN = ["book.txt", *SMALL, "--max_steps", "60", "--eval_interval", "20", "--out", "out/faulty"]


@pytest.fixture
def at_step(monkeypatch) -> Callable:
    """Have something happen in the middle of certain steps."""
    actions = {}

    def draw_and_act(length, batch_size, block_size, seed, step):
        actions.get(step, lambda: None)()
        return draw_starts(length, batch_size, block_size, seed, step)

    monkeypatch.setattr(training, "draw_starts", draw_and_act)
    return lambda step, action: actions.update({step: action})


class FaultyGPT(GPT):
    """A network with a fault that can be switched on."""

    fault = ""
    errors: ClassVar[list[Exception]] = []

    def forward(self, ids, *cached):
        if self.errors and self.training:
            raise self.errors.pop()
        if self.fault == "memory" and self.training and ids.size(1) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        logits = super().forward(ids, *cached)
        if self.fault == "loss" and self.training:
            return logits * torch.nan
        if self.fault == "gradient" and self.training:
            logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits


@pytest.fixture
def faulty(monkeypatch) -> type[FaultyGPT]:
    monkeypatch.setattr(run, "GPT", FaultyGPT)
    # A recorded step does not call the network any more.
    monkeypatch.setattr(graphs, "LARGEST_RECORDING", -1)
    monkeypatch.setattr(FaultyGPT, "fault", "")
    monkeypatch.setattr(FaultyGPT, "errors", [])
    return FaultyGPT


def assert_same_runs(one: str, other: str) -> None:
    for name in (BEST, LAST):
        assert Path(one, name).read_bytes() == Path(other, name).read_bytes()
    logs = [[line | {"seconds": 0} for line in read_log(Path(run))] for run in (one, other)]
    assert logs[0] == logs[1]
    names = ["best.safetensors", "last.safetensors", "log.jsonl"]
    assert sorted(os.listdir(other)) == names


@pytest.fixture(scope="module")
def _undisturbed_once(story, tmp_path_factory):
    words = [*RUN[1:-1], "run"]
    return train_in(tmp_path_factory.mktemp("undisturbed"), story, words) / "run"


@pytest.fixture
def undisturbed(_undisturbed_once) -> str:
    """A run like RUN that nothing happens to."""
    shutil.copytree(_undisturbed_once, "out/undisturbed")
    return "out/undisturbed"


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_no_number_stops_the_run_at_its_step(book, faulty, at_step, capsys, fault):
    at_step(27, lambda: setattr(faulty, "fault", fault))
    assert train.main([*RUN, "--warmup_steps", "0"]) == 1
    error = capsys.readouterr().err
    assert "at step 27, with learning_rate 0.0079 and muon_learning_rate 0.016, the loss" in error
    assert "out/faulty/last.safetensors keeps step 20" in error
    assert load_checkpoint(Path("out/faulty", LAST)).progress.step == 20
    faulty.fault = ""
    at_step(27, lambda: None)
    assert train.main(["--resume", "out/faulty"]) == 0


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 7 GiB"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_runs_out_once_makes_the_pieces_smaller(
    book, undisturbed, faulty, at_step, capsys, error
):
    at_step(27, lambda: faulty.errors.append(error))
    assert train.main(RUN) == 0
    said = capsys.readouterr().err
    assert said.count("memory ran out") == 1
    assert "from here on 2 instead of 4 windows go through the model at once" in said
    # The batch is the same, so only rounding differs.
    losses = [
        read_log(Path(folder))[-1]["validation_loss"] for folder in ("out/faulty", undisturbed)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] != losses[1]


def test_run_with_smaller_pieces_goes_on_with_them(book, faulty, at_step):
    words = [*RUN, "--dropout", "0.1"]  # which is drawn piece by piece
    at_step(27, lambda: faulty.errors.append(OUT_OF_MEMORY[0]))
    assert train.main([*words, "--out", "out/whole"]) == 0
    at_step(43, lambda: signal.raise_signal(signal.SIGINT))
    assert train.main(words) == 130
    assert train.main(["--resume", "out/faulty"]) == 0
    assert_same_runs("out/whole", "out/faulty")


def test_memory_that_always_runs_out_stops_the_run(book, faulty, at_step, capsys):
    at_step(27, lambda: setattr(faulty, "fault", "memory"))
    assert train.main(RUN) == 1
    error = capsys.readouterr().err
    assert "at step 27 memory ran out" in error
    assert (
        "go on with python train.py --resume out/faulty; out/faulty/last.safetensors keeps step 20"
        in error
    )


def test_model_that_does_not_fit_is_refused_at_the_start(book, faulty, capsys):
    faulty.fault = "memory"
    with pytest.raises(SystemExit) as exit_:
        train.main(RUN)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "not suffice for one window of 8 characters; a new run with --block_size 2 fits" in error
    assert not Path("out").exists()


def test_other_errors_are_not_taken_for_lack_of_memory(book, at_step):
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    at_step(27, fail)
    with pytest.raises(RuntimeError, match="mat1"):
        train.main(RUN)


@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
def test_ctrl_c_at_any_moment_leaves_a_run_that_goes_on(book, undisturbed, at_step, capsys, moment):
    def press_first(function: Callable) -> Callable:
        return lambda *arguments: (signal.raise_signal(signal.SIGINT), function(*arguments))[1]

    with pytest.MonkeyPatch.context() as patch:
        if moment == "step":
            at_step(40, lambda: signal.raise_signal(signal.SIGINT))
        else:
            # After step 39 come the evaluation of step 40 and the saving of it.
            module, name = (training, "read_in_order") if moment == "evaluation" else (os, "fsync")
            press_and_go_on = press_first(getattr(module, name))
            at_step(39, lambda: patch.setattr(module, name, press_and_go_on))
        if moment == "save":
            # The second Ctrl-C, which comes in the second of several writes, stops at once.
            with pytest.raises(KeyboardInterrupt):
                train.main(RUN)
        else:
            assert train.main(RUN) == 130
            assert "--resume out/faulty\n" in capsys.readouterr().out
    stopped_at = load_checkpoint(Path("out/faulty", LAST)).progress.step
    assert stopped_at == {"step": 41, "evaluation": 40, "save": 20}[moment]
    assert not list(Path("out/faulty").glob("*.tmp"))
    at_step(40, lambda: None)
    at_step(39, lambda: None)
    assert train.main(["--resume", "out/faulty"]) == 0
    assert_same_runs(undisturbed, "out/faulty")


def test_run_stopped_before_it_is_evaluated_again_does_not_praise_its_first_weights(
    book, at_step, capsys
):
    at_step(9, lambda: signal.raise_signal(signal.SIGINT))
    assert train.main(RUN) == 130
    said = capsys.readouterr().out
    assert f"at step 0, and not measured since; {Path('out/faulty', LAST)} has step 10\n" in said


def test_run_is_saved_between_evaluations(book, undisturbed, at_step):
    def break_off() -> None:
        raise KeyboardInterrupt

    at_step(33, break_off)
    with pytest.raises(KeyboardInterrupt):
        train.main([*RUN, "--save_minutes", "1e-9"])
    assert load_checkpoint(Path("out/faulty", LAST)).progress.step == 33
    at_step(33, lambda: None)
    assert train.main(["--resume", "out/faulty", "--save_minutes", "5"]) == 0
    assert_same_runs(undisturbed, "out/faulty")


def test_run_that_broke_off_before_its_first_evaluation_goes_on(book, undisturbed):
    def break_off(*_) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", break_off)
        with pytest.raises(KeyboardInterrupt):
            train.main(RUN)
    assert os.listdir("out/faulty") == [LAST]
    assert train.main(["--resume", "out/faulty"]) == 0
    assert_same_runs(undisturbed, "out/faulty")


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no command that takes a terminal")
def test_run_is_saved_when_its_terminal_is_closed(book):
    controller, terminal = pty.openpty()
    words = [sys.executable, train.__file__, *RUN, "--max_steps", "100000"]
    # What is held back for a terminal that is gone must not change the exit code.
    held_back = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        ["setsid", "--ctty", *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=held_back,
    ) as process:
        os.close(terminal)
        with open(controller, encoding="utf-8", errors="replace") as screen:
            next(line for line in screen if line.startswith("step 20 of"))
        # A shell that ends sends the signal again, which may come as late as when Python ends.
        while process.poll() is None:
            process.send_signal(signal.SIGHUP)
    # Killed by the signal, it would be negative; not saved, 1.
    assert process.returncode == 129
    assert load_checkpoint(Path("out/faulty", LAST)).progress.step >= 20


def test_second_process_is_refused(book, capsys):
    # Not saved again after step 0, it can go on to step 30.
    seldom = ["--max_steps", "100000", "--eval_interval", "100000"]
    command = [sys.executable, train.__file__, *RUN, *seldom]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            next(line for line in process.stdout if line.startswith("step 0 of"))
            with pytest.raises(SystemExit) as exit_:
                train.main(["--resume", "out/faulty"])
        finally:
            process.kill()
    assert exit_.value.code == 2
    assert "another process is training in out/faulty" in capsys.readouterr().err
    assert train.main(["--resume", "out/faulty", "--max_steps", "30"]) == 0


WAITING = """
import sys
from config.script import run_script

def main():
    try:
        print("ready")
        sys.stdin.read()
    finally:
        print("cleaned up")

run_script(main)
"""


INTERRUPTED = """
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from config.script import run_script

def main():
    ThreadPoolExecutor(1).submit(Event().wait)
    print("computing")
    raise KeyboardInterrupt

run_script(main)
"""


def test_script_that_is_interrupted_does_not_wait_for_threads():
    command = [sys.executable, "-c", INTERRUPTED]
    folder = Path(train.__file__).parent
    ended = subprocess.run(command, cwd=folder, timeout=60, stdout=subprocess.PIPE)
    assert ended.returncode == 130
    assert ended.stdout == b"computing\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_script_that_is_ended_leaves_nothing_half_written(name):
    number = getattr(signal, name)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    command = [sys.executable, "-c", WAITING]
    folder = Path(train.__file__).parent
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "cleaned up\n"
    assert process.returncode == 128 + number


def test_run_that_another_process_made_meanwhile_is_not_overwritten(book, monkeypatch, capsys):
    def plan_slowly(*arguments):
        Path("out/faulty").mkdir(parents=True)
        Path("out/faulty", LAST).write_text("of the other process")
        return plan(*arguments)

    plan = train.plan
    monkeypatch.setattr(train, "plan", plan_slowly)
    with pytest.raises(SystemExit):
        train.main(RUN)
    assert "out/faulty already holds a run" in capsys.readouterr().err
    assert Path("out/faulty", LAST).read_text() == "of the other process"


@contextlib.contextmanager
def limited_files(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_is_full_for_a_while_loses_nothing(book, undisturbed, at_step, capsys):
    with contextlib.ExitStack() as stack:
        at_step(17, lambda: stack.enter_context(limited_files(1000)))
        at_step(23, stack.close)
        assert train.main(RUN) == 0
    error = capsys.readouterr().err
    assert "could not save step 20" in error
    assert "File too large; last.safetensors is still that of step 0" in error
    assert_same_runs(undisturbed, "out/faulty")


def test_best_model_that_found_the_disk_full_is_saved_later(at_step, capsys):
    # In noise there is nothing to learn, so after a while it only gets worse.
    noise = "".join(random.Random(1).choices("abcdefgh", k=400))
    Path("book.txt").write_text(noise)
    words = [*RUN, "--n_embd", "32", "--max_steps", "200"]
    assert train.main([*words, "--out", "out/undisturbed"]) == 0
    best = load_checkpoint(Path("out/undisturbed", BEST)).progress.step
    assert 0 < best < 200
    with contextlib.ExitStack() as stack:
        # The log still fits, the checkpoints do not.
        at_step(best - 1, lambda: stack.enter_context(limited_files(20_000)))
        at_step(best + 1, stack.close)
        assert train.main(words) == 0
    assert f"could not save step {best}" in capsys.readouterr().err
    assert_same_runs("out/undisturbed", "out/faulty")


def test_best_model_for_which_the_disk_had_room_outlives_a_worse_one(
    book, undisturbed, at_step, capsys
):
    best, last = (Path(undisturbed, name).stat().st_size for name in (BEST, LAST))
    with contextlib.ExitStack() as stack:
        at_step(10, lambda: stack.enter_context(limited_files((best + last) // 2)))
        assert train.main(RUN) == 1
    assert "what came after step 0 is lost, but best.safetensors has step 60;" in (
        capsys.readouterr().err
    )
    at_step(10, lambda: None)
    kept = Path("out/faulty", BEST).read_bytes()
    assert kept == Path(undisturbed, BEST).read_bytes()
    at_step(25, lambda: signal.raise_signal(signal.SIGINT))
    assert train.main(["--resume", "out/faulty"]) == 130
    assert Path("out/faulty", BEST).read_bytes() == kept
    assert "at step 60: out/faulty/best.safetensors\n" in capsys.readouterr().out
    at_step(25, lambda: None)
    assert train.main(["--resume", "out/faulty"]) == 0
    assert_same_runs(undisturbed, "out/faulty")


def test_run_whose_folder_was_moved_away_is_saved_all_the_same(book, undisturbed, at_step):
    at_step(33, lambda: shutil.move("out/faulty", "out/moved"))
    assert train.main(RUN) == 0
    assert_same_runs(undisturbed, "out/faulty")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_does_not_stop_the_run(book, undisturbed, monkeypatch):
    def plan_and_lose_the_output(*arguments):
        planned = plan(*arguments)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", 1))
        return planned

    plan = train.plan
    monkeypatch.setattr(train, "plan", plan_and_lose_the_output)
    assert train.main(RUN) == 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.close()
    assert_same_runs(undisturbed, "out/faulty")


def test_disk_that_stays_full_ends_the_run_with_a_sentence(book, at_step, capsys):
    with contextlib.ExitStack() as stack:
        at_step(27, lambda: stack.enter_context(limited_files(1000)))
        assert train.main(RUN) == 1
    assert "step 60 could not be saved, so what came after step 20 is lost" in (
        capsys.readouterr().err
    )
    for name in (BEST, LAST):
        assert load_checkpoint(Path("out/faulty", name)).progress.step == 20
    assert not list(Path("out/faulty").glob("*.tmp"))
    at_step(27, lambda: None)
    assert train.main(["--resume", "out/faulty"]) == 0


def test_folder_that_cannot_be_written_is_refused_at_the_start(book, capsys):
    Path("out").mkdir(mode=0o555)
    os.chmod(".", 0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # permissions mean nothing to root
    try:
        if not os.access(train.__file__, os.R_OK, effective_ids=True):
            pytest.skip("the project lies in a folder that only root may read")
        with pytest.raises(SystemExit) as exit_:
            train.main(RUN)
    finally:
        os.seteuid(user)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "train.py: out/faulty: Permission denied\n"


def test_resuming_with_more_steps_says_what_that_does(book, undisturbed, capsys):
    assert train.main(["--resume", undisturbed, "--max_steps", "70"]) == 0
    assert (
        "max_steps 60 becomes 70: at step 60 the learning rate is 20% of its highest instead of 0%"
    ) in capsys.readouterr().out
