"""A step can be recorded: nothing that differs between steps is known to Python alone."""

import contextlib

import pytest
import torch
from conftest import SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
import train
import training
from graphs import CALLS_BEFORE_RECORDING, Recorded
from optimizer import make_optimizers


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["--dtype", "float32"], 1),
        # Long enough a context for torch's fused attention.
        (["--block_size", "32", "--dtype", "float32"], 1),
        (["--dtype", "bfloat16", "--muon_weight_decay", "0.1"], 1),
        # Two of each of two parts, which threads share.
        (["--batch_size", "600", "--dtype", "float32"], 4),
        (["--batch_size", "600", "--dtype", "bfloat16"], 4),
    ],
)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_recorded_step_makes_the_same_steps(book, monkeypatch, words, pieces, optimizer):
    words = [book, *SMALL, "--optimizer", optimizer, *words]
    losses, weights, calls = twelve_steps(words)
    assert calls == pieces * (CALLS_BEFORE_RECORDING + 1)
    monkeypatch.setattr(training, "Recorded", lambda function, _: function)
    plain_losses, plain_weights, calls = twelve_steps(words)
    assert calls == pieces * 12
    assert losses == plain_losses
    assert all(map(torch.equal, weights, plain_weights))


def twelve_steps(words: list[str]) -> tuple[list[float], list[Tensor], int]:
    """The losses of twelve steps, the weights after them, and how often the model was called."""
    run = train.begin(*train.command_line().parse(words))
    calls = []
    run.model.head.register_forward_hook(lambda *_: calls.append(1))
    take_step = train.step_function(run)
    losses = [take_step(step, 12).item() for step in range(12)]
    return losses, [*run.model.parameters(), *run.average.parameters()], len(calls)


def test_recorded_step_tells_of_gradients_that_are_not_finite(book):
    run = train.begin(*train.command_line().parse([book, *SMALL]))
    take_step = train.step_function(run)
    assert all(take_step(step, 12).isfinite() for step in range(6))
    # The loss is a large number, but squares of its gradients are none.
    torch.nn.init.normal_(run.model.head.weight, std=1e25)
    assert take_step(6, 12).isnan()


def test_step_with_dropout_is_not_recorded_on_a_cpu(book):
    _, _, calls = twelve_steps([book, *SMALL, "--dropout", "0.1"])
    assert calls == 12


class OneDevice(TorchDispatchMode):
    """Refuses an operation on two devices; torch allows it if one of them has a single number."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or else it would import the compiler

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # The `meta` device does not know the one with a rate in a tensor, which returns nothing.
        known = operation is not torch.ops.aten._fused_adamw_.tensor_lr
        result = operation(*args, **kwargs) if known else None
        devices = {tensor.device for tensor in graphs._tensors((args, kwargs, result))}
        assert len(devices) <= 1, operation
        return result


@pytest.mark.parametrize(
    "words", [["--dropout", "0.1"], ["--optimizer", "adamw"], ["--dtype", "bfloat16"]]
)
def test_what_a_gpu_records_of_a_step_looks_at_no_number_and_takes_none_from_the_cpu(
    book, monkeypatch, words
):
    # On torch's `meta` device there are shapes only, so to look at a number is an error, as it is
    # on a GPU that records. A number from the CPU would be accepted there, and repeated ever after.
    calls = []

    def recorded(function, device: torch.device):
        def call(argument: Tensor) -> Tensor:
            calls.append(function)
            with OneDevice():
                return function(argument)

        return call

    monkeypatch.setattr(training, "Recorded", recorded)
    run = train.begin(*train.command_line().parse([book, *SMALL, *words]))
    run.model.to("meta")
    run.average.to("meta")
    run.optimizers = make_optimizers(run.model, run.optimizer_config, run.precision)
    run.training_ids = run.training_ids.to("meta")
    assert train.step_function(run)(0, 12).is_meta
    assert len(calls) == 3  # gradient, clipping, and what the optimizers do


def test_recorded_function_computes_with_what_its_tensors_hold_then():
    state, weight = torch.zeros(4, 3), torch.ones(3, 2, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        first, second = state.T.chunk(2, dim=1)
        first += x[:, None]
        second.copy_(first.exp() - first)  # other temporaries of the same size lie between
        y = torch.zeros(4, 2)
        y += (state @ weight).relu() + state.clone().sum(dim=1, keepdim=True)
        (weight.grad,) = torch.autograd.grad(y.norm(), weight)
        with torch.no_grad():
            weight.sub_(weight.grad)
        weight.grad = None
        values, places = y.max(dim=0)
        return values.sum() + places.float().mean()

    def results(call) -> list[float]:
        state.zero_()
        torch.nn.init.ones_(weight)
        return [call(torch.tensor([0.1, 0.2, 0.3]) * i).item() for i in range(8)]

    expected = results(function)
    assert results(Recorded(function, torch.device("cpu"))) == expected
    assert len(set(expected)) == 8


def look_at_a_number(x: Tensor) -> Tensor:
    return x * x.sum().item()


def run_out_of_memory(x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        torch.zeros(2**60)
    return x * x.sum()


def compute_much(x: Tensor) -> Tensor:
    for _ in range(20):
        x = x + torch.zeros(1000, 2)[0]
    return x * x.sum()


@pytest.mark.parametrize("function", [look_at_a_number, run_out_of_memory, compute_much])
def test_where_recording_is_given_up_the_function_is_called(monkeypatch, function):
    monkeypatch.setattr(graphs, "LARGEST_RECORDING", 100_000)
    names = []

    def called(x: Tensor) -> Tensor:
        names.append(function.__name__)
        return function(x)

    recorded = Recorded(called, torch.device("cpu"))
    calls = CALLS_BEFORE_RECORDING + 3
    results = [recorded(torch.tensor([1.0, i])).tolist() for i in range(calls)]
    assert results == [[1.0 + i, i + i * i] for i in range(calls)]
    assert len(names) == calls


def test_where_recording_a_gpu_fails_the_function_is_called_and_one_line_says_so(capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    function = Recorded(look_at_a_number, torch.device("cuda"))
    calls = CALLS_BEFORE_RECORDING + 3
    results = [function(torch.tensor([1.0, i], device=device)).tolist() for i in range(calls)]
    assert results == [[1.0 + i, i + i * i] for i in range(calls)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the GPU waits for Python, which is slower: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_seeds_reach_every_recording_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())

    def function(x: Tensor) -> Tensor:
        return x + torch.rand(4, device=device)

    one, other = Recorded(function, device), Recorded(function, device)
    for seed in range(CALLS_BEFORE_RECORDING + 4):
        results = []
        for call in (function, one, other):
            torch.manual_seed(seed)
            results.append(call(torch.zeros(4, device=device)).tolist())
        assert results[0] == results[1] == results[2]
