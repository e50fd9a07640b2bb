"""A step in pieces is the step of the whole batch; an evaluation reads every character once.

And what makes either fast does so.
"""

import contextlib
import copy
import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch.nn import functional as F

import graphs
import train
import training
from checkpoint import optimizer_tensors
from config.hardware import ran_out_of_memory
from data import draw_starts, read_windows
from data.batches import STRETCH
from model import GPT, GPTConfig
from optimizer import as_one_vector, make_optimizers


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_step_in_pieces_has_the_gradients_of_the_whole_batch(book, monkeypatch, dtype, tolerance):
    words = [book, *SMALL, "--batch_size", "10", "--dtype", dtype, "--grad_clip", "1e9"]
    losses, gradients = [], []
    # Pieces of 10, 3 and 1 windows, then of 2 and 2 and 1 in each of two parts.
    for characters, activations in [(1000, 2**30), (24, 2**30), (1, 2**30), (32, 1)]:
        monkeypatch.setattr(training, "PIECE_CHARACTERS", characters)
        monkeypatch.setattr(training, "THREAD_ACTIVATIONS", activations)
        run = train.begin(*train.command_line().parse([*words, "--optimizer", "adamw"]))
        losses.append(train.step_function(run)(0, 1).item())
        # After one step, AdamW's mean of gradients is a tenth of the gradient.
        tensors = optimizer_tensors(run.model, run.optimizers)
        gradients.append({name: t for name, t in tensors.items() if name.endswith("exp_avg")})
    assert losses == pytest.approx([losses[0]] * 4, rel=tolerance)
    for other in gradients[1:]:
        for name, whole in gradients[0].items():
            assert (other[name] - whole).norm() <= tolerance * whole.norm()


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("activations", [1, 2**30])  # a batch in two parts, and whole
def test_long_gradient_is_shortened_and_a_short_one_is_not(book, monkeypatch, activations):
    monkeypatch.setattr(training, "THREAD_ACTIVATIONS", activations)
    words = [book, *SMALL, "--dtype", "float32", "--optimizer", "adamw", "--grad_clip"]
    gradients = {}
    for clip in (1e9, 2e9, 0.01):
        run = train.begin(*train.command_line().parse([*words, str(clip)]))
        train.step_function(run)(0, 1)
        tensors = optimizer_tensors(run.model, run.optimizers)
        # After one step, AdamW's mean of gradients is a tenth of the gradient.
        means = [10 * t.flatten() for name, t in tensors.items() if name.endswith("exp_avg")]
        gradients[clip] = torch.cat(means)
    whole = gradients[1e9]
    assert whole.norm() > 0.01
    assert torch.equal(gradients[2e9], whole)
    expected = whole * (0.01 / whole.norm())
    assert (gradients[0.01] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gradients_averages_and_copies_are_those_of_their_weights(book, dtype, optimizer):
    words = [book, *SMALL, "--dtype", dtype, "--optimizer", optimizer, "--grad_clip", "1e9"]
    run = train.begin(*train.command_line().parse(words))
    take_step, ids = train.step_function(run), run.training_ids
    for step in range(3):
        plain = copy.deepcopy(run.model).to(run.precision)
        inputs, targets = read_windows(ids, draw_starts(len(ids), 4, 8, run.config.seed, step), 8)
        with training.on_threads(1):  # so many make a step of so small a model, too
            logits = plain(inputs).float().flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / targets.numel()
            loss.backward()
        assert take_step(step, 100).item() == pytest.approx(loss.item(), rel=1e-5)
        if step == 0:
            # The average of one step is that step, and a mean of gradients is a tenth of it.
            averages, tensors = (
                run.average.state_dict(),
                optimizer_tensors(run.model, run.optimizers),
            )
            for name, weight in run.model.state_dict().items():
                assert torch.equal(averages[name], weight)
            for name, parameter in plain.named_parameters():
                if (mean := tensors.get(f"{name}.exp_avg")) is not None:
                    gradient = parameter.grad.float()
                    torch.testing.assert_close(10 * mean, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_optimizers_divided_between_threads_do_what_undivided_ones_do(
    book, monkeypatch, dtype, tolerance
):
    monkeypatch.setattr(training, "THREAD_ACTIVATIONS", 1)
    words = [book, *SMALL, "--dtype", dtype]
    divided, undivided = (train.begin(*train.command_line().parse(words)) for _ in range(2))
    undivided.optimizers = make_optimizers(
        undivided.model, undivided.optimizer_config, undivided.precision
    )
    assert [len(run.optimizers) for run in (divided, undivided)] == [3, 2]
    tensors = []
    for run in (divided, undivided):
        take_step = train.step_function(run)
        for step in range(6):
            take_step(step, 6)
        averages = {f"average.{name}": x for name, x in run.average.state_dict().items()}
        state = optimizer_tensors(run.model, run.optimizers)
        tensors.append(run.model.state_dict() | averages | state)
    for name, tensor in tensors[0].items():
        assert (tensor - tensors[1][name]).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_begin_at_multiples_of_16_bytes(optimizer):
    Path("odd.txt").write_text("".join(map(chr, range(97, 112))) * 40)  # 15 different characters
    run = train.begin(*train.command_line().parse(["odd.txt", *SMALL, "--optimizer", optimizer]))
    train.step_function(run)
    # The average lies in one vector, in the order of the copies that are multiplied.
    offsets = [p.storage_offset() for p in run.average.parameters() if p.dim() == 2]
    assert len(set(offsets)) == 3 + 4 * 3
    assert all(offset % 8 == 0 for offset in offsets)  # of numbers of 2 bytes


def test_average_counts_late_weights_most_and_forgets_the_first():
    model, average = (GPT(GPTConfig(4, 1, 1, 4), 5) for _ in range(2))
    weights, averaged = (as_one_vector(list(of.parameters())) for of in (model, average))
    for step in range(100):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, step + 1)
        share = torch.tensor(training.averaging_share(step))
        training.update_average([averaged], [weights], share)
    # Step t counts (t + 1)(t + 2)...(t + p) times, so the mean of t is ((p + 1) 100 + 1) / (p + 2).
    for parameter in average.parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1701 / 18))


PEAK_OF_EVALUATION = """
import re, sys
sys.path.insert(0, {root!r})
import torch
import training
from model import GPT, GPTConfig
training.keep_freed_memory()
model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=96), 5001)
# Batches of 4,096 characters, with 82 MB of logits each.
for batches in (2, 12):
    training.evaluate(model, torch.zeros(4096 * batches + 1, dtype=torch.long), torch.float32)
    # Of this process; what getrusage tells begins with what the one that starts it has used.
    print(re.search("VmHWM: +([0-9]+) kB", open("/proc/self/status").read().expandtabs())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="that memory is kept is so on Linux only")
def test_long_text_takes_no_more_memory_to_evaluate_than_a_short_one():
    program = PEAK_OF_EVALUATION.format(root=os.path.dirname(training.__file__))
    said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    few, many = (1024 * int(peak) for peak in said.stdout.split())
    # Ten batches more, and not as much as the logits of four.
    assert many - few < 4 * 4 * 4096 * 5001


def test_evaluation_is_the_mean_over_every_character_of_the_text():
    torch.manual_seed(1)
    model = GPT(GPTConfig(8, 1, 1, 4, dropout=0.5), 5)
    ids = torch.randint(5, (100,))
    model.eval()
    losses = []
    for target in range(1, 100):
        # Each window starts at a multiple of 8 and does not see the one before it.
        start = (target - 1) // 8 * 8
        logits = model(ids[None, start:target])[0, -1]
        losses.append(F.cross_entropy(logits, ids[target]).item())
    model.train()
    assert training.evaluate(model, ids, torch.float32) == pytest.approx(sum(losses) / 99, rel=1e-5)
    assert model.training


def test_very_long_validation_part_is_read_in_part(monkeypatch):
    torch.manual_seed(1)
    model, ids = GPT(GPTConfig(8, 1, 1, 4), 5), torch.randint(5, (5 * STRETCH + 1,))
    # Two of five stretches: the one at the beginning and the one in the middle.
    read = torch.cat((ids[:STRETCH], ids[2 * STRETCH : 3 * STRETCH]))
    expected = training.evaluate(model, read, torch.float32)
    assert training.evaluate(model, ids, torch.float32) != expected
    monkeypatch.setattr(training, "EVALUATED_CHARACTERS", 2 * STRETCH)
    assert training.evaluate(model, ids, torch.float32) == expected


@pytest.mark.usefixtures("_two_threads")
def test_evaluation_is_divided_between_threads():
    torch.manual_seed(1)
    model, ids = GPT(GPTConfig(64, 1, 2, 32), 65), torch.randint(65, (2 * 4096 + 100,))
    with training.on_threads(1):
        expected = training.character_losses(model, ids, torch.float32)
    seen, all_at_once = set(), threading.Barrier(2, timeout=60)

    def note_thread(_, arguments):
        if len(arguments[0]) > 1:  # the last windows are no more than one at a time
            all_at_once.wait()
            seen.add((threading.get_ident(), torch.get_num_threads()))

    model.register_forward_pre_hook(note_thread)
    losses = training.character_losses(model, ids, torch.float32)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert len(seen) == 2
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
def test_evaluation_goes_on_in_one_part_once_memory_has_run_out():
    torch.manual_seed(1)
    model, ids = GPT(GPTConfig(64, 1, 2, 32), 65), torch.randint(65, (4096 + 1,))
    expected = training.character_losses(model, ids, torch.float32)
    sizes = []

    def run_out_of_memory(_, arguments):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        sizes.append(len(arguments[0]))

    model.register_forward_pre_hook(run_out_of_memory)
    losses = training.character_losses(model, ids, torch.float32)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert sizes == [32, 32]


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("words", "n_parts", "threads_of_each"),
    [
        (["--batch_size", "4"], 1, 1),
        (["--batch_size", "1024"], 2, 1),
    ],
)
def test_large_batch_is_divided_between_threads(book, words, n_parts, threads_of_each):
    run = train.begin(*train.command_line().parse([book, *SMALL, "--dtype", "float32", *words]))
    seen, all_at_once = set(), threading.Barrier(n_parts, timeout=60)

    def note_thread(*_):
        all_at_once.wait()
        seen.add((threading.get_ident(), torch.get_num_threads()))

    run.model.register_forward_pre_hook(note_thread)
    train.step_function(run)(0, 1)
    assert len(seen) == n_parts
    assert {threads for _, threads in seen} == {threads_of_each}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
def test_what_is_dropped_depends_on_step_and_part(book, monkeypatch):
    monkeypatch.setattr(training, "THREAD_ACTIVATIONS", 1)
    words = [book, *SMALL, "--dtype", "float32", "--dropout", "0.5"]
    run = train.begin(*train.command_line().parse(words))
    dropped = []
    run.model.dropout.register_forward_hook(lambda *call: dropped.append(call[-1] == 0))
    take_step = train.step_function(run)
    for step in (0, 1, 0):
        take_step(step, 2)
    # Two parts of each step, in any order.
    assert sorted(x.tolist() for x in dropped[:2]) == sorted(x.tolist() for x in dropped[4:])
    for one, other in itertools.combinations(dropped[:4], 2):
        different = (one != other).float().mean().item()
        assert different == pytest.approx(0.5, abs=5 * 0.5 / one.numel() ** 0.5)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dropout", ["0", "0.5"])  # what a part drops does not depend on others
def test_parts_are_computed_one_by_one_once_memory_has_run_out(book, monkeypatch, capsys, dropout):
    monkeypatch.setattr(training, "THREAD_ACTIVATIONS", 1)
    words = [book, *SMALL, "--dtype", "float32", "--dropout", dropout]
    whole, halved = (train.begin(*train.command_line().parse(words)) for _ in range(2))
    threads = []

    def run_out_of_memory(*_):
        threads.append(threading.current_thread())
        if threads[-1] is not threading.main_thread():
            raise MemoryError

    halved.model.register_forward_pre_hook(run_out_of_memory)
    steps = train.step_function(whole), train.step_function(halved)
    for step in range(2):
        losses = [take_step(step, 2).item() for take_step in steps]
        # More threads share an operation when one part comes after the other: it rounds otherwise.
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Two parts that fail, then two in each step.
    assert threads[2:] == [threading.main_thread()] * 4
    assert halved.progress.windows == 2
    said = capsys.readouterr().err
    assert said.count("memory ran out: from here on 2 instead of 4 windows") == 1


@pytest.mark.usefixtures("_two_threads")
def test_thread_of_a_part_keeps_its_number_of_threads_until_it_is_used():
    with ThreadPoolExecutor(1, initializer=training.set_own_threads, initargs=(1,)) as pool:
        pool.submit(int).result()
        torch.set_num_threads(2)
        assert pool.submit(torch.get_num_threads).result() == 1


def test_memory_that_runs_out_in_what_is_recorded_has_smaller_pieces_recorded(book, monkeypatch):
    out_of_memory = []
    record = graphs.Operations.repeater

    def record_to_fail(*args):
        repeat = record(*args)

        def repeat_or_fail():
            if out_of_memory:
                raise out_of_memory.pop()
            repeat()

        return repeat_or_fail

    monkeypatch.setattr(graphs.Operations, "repeater", record_to_fail)
    run = train.begin(*train.command_line().parse([book, *SMALL]))
    forwards = []
    run.model.register_forward_hook(lambda *_: forwards.append(1))
    take_step = train.step_function(run)
    for step in range(graphs.CALLS_BEFORE_RECORDING + 2):
        take_step(step, 20)
    assert len(forwards) == graphs.CALLS_BEFORE_RECORDING + 1
    out_of_memory.append(MemoryError())
    take_step(5, 20)
    assert run.progress.windows == 2
    assert len(forwards) == graphs.CALLS_BEFORE_RECORDING + 1 + 2


def test_tasks_are_over_when_there_is_no_room_for_another_thread():
    over = []

    class Full(ThreadPoolExecutor):
        def submit(self, task):
            if self._threads:
                raise RuntimeError("can't start new thread")
            return super().submit(task)

    with Full(2) as pool:
        with pytest.raises(RuntimeError) as error:
            training.side_by_side([lambda: over.append(sum(range(10**6))), int], pool)
        assert len(over) == 1
    assert ran_out_of_memory(error.value)


def test_tasks_are_over_when_one_of_them_fails_and_what_it_allocated_is_freed():
    held, over = [], []

    def fail():
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise MemoryError

    def take_longer():
        over.append(sum(range(10**6)))

    gc.disable()
    try:
        with ThreadPoolExecutor(2) as pool:
            with contextlib.suppress(MemoryError):
                training.side_by_side([fail, take_longer], pool)
            assert over == [sum(range(10**6))]
        # Now that its thread is over, nothing but an error that is kept could hold it.
        assert held[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("n_threads", "words", "expected"),
    [
        (1, [], (1, 1)),
        (2, [], (2, 1)),
        (3, [], (3, 1)),
        (6, [], (3, 2)),
        (7, [], (1, 7)),
        (64, [], (4, 2)),  # more than eight would have too little to do
        (2, ["--batch_size", "1"], (1, 1)),
        (4, ["--block_size", "2000"], (2, 2)),  # no more than 4,096 characters at once
    ],
)
def test_batch_is_divided_into_parts_that_keep_the_threads_busy(book, n_threads, words, expected):
    words = ["--preset", "mini", "--n_embd", "64", "--device", "cpu", *words]
    run = train.begin(*train.command_line().parse([book, *words]))
    batch_size, shape = run.config.batch_size, run.model.config
    with training.on_threads(n_threads):
        assert training.divide_among_threads(batch_size, shape, torch.device("cpu")) == expected
    on_gpu = training.divide_among_threads(batch_size, shape, torch.device("cuda"))
    assert on_gpu[0] == 1


def last_line_of(code: str) -> bytes:
    """The last line that code prints in a process of its own, started as a user would."""
    waiting = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {name: value for name, value in os.environ.items() if name not in waiting}
    environment["PYTHONPATH"] = str(Path(training.__file__).parent)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return result.stdout.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="how glibc behaves")
@pytest.mark.parametrize(("in_thread", "size"), [(False, 2**23), (True, 48 * 2**20)])
def test_freed_memory_is_kept(in_thread, size):
    # In a process of its own: what the allocator does depends on all that happened before.
    code = """
import resource, torch, training
from concurrent.futures import ThreadPoolExecutor
training.keep_freed_memory()
faults = []

def allocate():
    for _ in range(10):
        [torch.ones({size}, dtype=torch.uint8) for _ in range(16)]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

if {in_thread}:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(allocate).result()
else:
    allocate()
print(faults[-1] - faults[4])
"""
    # In the last five times there are none; otherwise 15 or more in each, up to all 196,608.
    assert int(last_line_of(code.format(in_thread=in_thread, size=size))) < 5 * 15


def test_neither_training_nor_writing_loads_the_compiler(book):
    code = f"""
import sys, sample, train
train.main([{book!r}, *{SMALL}, "--max_steps", "2"])  # the rehearsal before it records a step
sample.main(["--length", "20"])
print("torch._dynamo" in sys.modules)
"""
    assert last_line_of(code) == b"False"


@pytest.mark.parametrize("script", ["train", "sample", "compare"])
def test_threads_are_told_how_to_wait_before_torch_is_loaded(script):
    code = f"""
import os, sys

class Torch:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"])
            sys.exit()

sys.meta_path.insert(0, Torch)
import {script}
"""
    assert last_line_of(code) == b"1000 1"
