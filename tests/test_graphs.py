"""A step can be recorded and replayed: nothing that differs between steps is known to Python alone.

There is no GPU here, so what a CUDA graph does is done with the operations that torch dispatches.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
import training
from graphs import CALLS_BEFORE_RECORDING, Recorded


class Tape(TorchDispatchMode):
    """Operations as they come, which can be done again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, before in self.operations:
            if not operation.is_view:
                now = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


def on_tape(function: Callable[[Tensor], Tensor], _: torch.device) -> Callable:
    """Record an early call of a function on a CPU, and replay it from then on."""
    tape, kept, calls = Tape(), {}, itertools.count()

    def call(argument: Tensor) -> Tensor:
        if next(calls) < CALLS_BEFORE_RECORDING:
            return function(argument)
        if not kept:
            kept["argument"] = argument.clone()
            with tape:
                kept["result"] = function(kept["argument"])
        else:
            kept["argument"].copy_(argument)
            tape.replay()
        return kept["result"].clone()

    return call


@pytest.mark.parametrize("words", [["--dtype", "float32"], ["--dtype", "bfloat16"], []])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_recorded_step_makes_the_same_steps(book, monkeypatch, words, optimizer):
    words = [book, *SMALL, "--optimizer", optimizer, *(words or ["--batch_size", "300"])]

    def after_some_steps() -> tuple[list[float], list[Tensor]]:
        run = train.begin(*train.command_line().parse(words))
        take_step = train.step_function(run)
        losses = [take_step(step, 12).item() for step in range(12)]
        return losses, [*run.model.parameters(), *run.average.parameters()]

    losses, weights = after_some_steps()
    monkeypatch.setattr(training, "recorded", on_tape)
    replayed_losses, replayed_weights = after_some_steps()
    assert replayed_losses == losses
    assert all(map(torch.equal, replayed_weights, weights))


def test_where_recording_fails_the_function_is_called_and_one_line_says_so(capsys):
    # It looks at a number, which cannot be recorded.
    function = Recorded(lambda x: x * x.sum().item())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = CALLS_BEFORE_RECORDING + 3
    results = [function(torch.tensor([1.0, i], device=device)).tolist() for i in range(calls)]
    assert results == [[1.0 + i, i + i * i] for i in range(calls)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the GPU waits for Python, which is slower: ")
