"""CUDA graphs: what a GPU is told to do, recorded once and replayed. Nothing else knows of them."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

# Libraries set themselves up when they are first used, and that must not be recorded.
CALLS_BEFORE_RECORDING = 3


def recorded(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable:
    """Return a function of one tensor in its fastest form: on a GPU it is recorded."""
    return Recorded(function) if device.type == "cuda" else function


class Recorded:
    """A function of one tensor on a GPU that is recorded in an early call and replayed after that.

    A small model keeps a GPU waiting for Python; what is recorded comes without Python. Each call
    must do the same to the same tensors, its argument apart: what differs between calls has to be
    read from tensors, and nothing may wait for a result. Random numbers are those of the seed at
    the time of the call. Where recording fails, one line says so, and the function is called as
    it is from then on.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.calls = 0
        self.graph = None

    def __call__(self, argument: Tensor) -> Tensor:
        """Return what the function returns, in a tensor of its own."""
        self.calls += 1
        if self.calls == CALLS_BEFORE_RECORDING + 1:
            self._record(argument)
        if self.graph is None:
            return self.function(argument)
        self.argument.copy_(argument)
        self.graph.replay()
        return self.result.clone()

    def _record(self, argument: Tensor) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            self.argument = argument.clone()
            # Recording computes nothing, so a failure leaves everything as it was.
            # The outer context goes back to the stream of before even after a failure.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.result = self.function(self.argument)
            self.graph = graph
        except (MemoryError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            tqdm.write(f"the GPU waits for Python, which is slower: {reason}", file=sys.stderr)
