"""A step can be recorded: nothing that differs between steps is known to Python alone."""

import pytest
import torch
from conftest import SMALL
from torch import Tensor

import train
import training
from graphs import CALLS_BEFORE_RECORDING, Recorded


@pytest.mark.parametrize("words", [["--dtype", "float32"], ["--dtype", "bfloat16"], []])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_recorded_step_makes_the_same_steps(book, monkeypatch, words, optimizer):
    words = [book, *SMALL, "--optimizer", optimizer, *(words or ["--batch_size", "300"])]
    losses, weights, calls = twelve_steps(words)
    assert calls == CALLS_BEFORE_RECORDING + 1
    monkeypatch.setattr(training, "Recorded", lambda function, _: function)
    plain_losses, plain_weights, calls = twelve_steps(words)
    assert calls == 12
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


def test_recorded_step_tells_of_weights_that_are_not_finite(book):
    run = train.begin(*train.command_line().parse([book, *SMALL]))
    take_step = train.step_function(run)
    assert all(take_step(step, 12).isfinite() for step in range(6))
    torch.nn.init.constant_(run.model.token_embedding.weight, torch.inf)
    assert take_step(6, 12).isnan()


def test_step_with_dropout_is_not_recorded_on_a_cpu(book):
    _, _, calls = twelve_steps([book, *SMALL, "--dropout", "0.1"])
    assert calls == 12


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


def test_where_recording_a_gpu_fails_the_function_is_called_and_one_line_says_so(capsys):
    # It looks at a number, which cannot be recorded.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    function = Recorded(lambda x: x * x.sum().item(), torch.device("cuda"))
    calls = CALLS_BEFORE_RECORDING + 3
    results = [function(torch.tensor([1.0, i], device=device)).tolist() for i in range(calls)]
    assert results == [[1.0 + i, i + i * i] for i in range(calls)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the GPU waits for Python, which is slower: ")
