"""What is done again and again, recorded once and replayed; nothing else knows how.

On an NVIDIA GPU that is a CUDA graph. On a CPU it is a list of operations: a step of `tiny` is two
hundred small ones, and without what Python and autograd do between them it takes 0.66 of the time,
one of `mini` 0.9, and one of `small` 0.93. A model 64 wide writes twice as fast.
"""

import contextlib
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

# Libraries set themselves up when they are first used, and that must not be recorded.
CALLS_BEFORE_RECORDING = 3
# On a CPU, a recording keeps all that is computed in it until it is over. One that would keep more
# bytes than this is given up: then operations are so large that little lies between them.
LARGEST_RECORDING = 2**29

# An operation as it was carried out, with what it was given, and what it returned.
Call = tuple[OpOverload, tuple, dict[str, Any], Any]

aten = torch.ops.aten
COPIES = {aten.clone.default, aten._to_copy.default}
# What these have to write to a given place computes elsewhere and copies. What stands on the right
# computes the same, right there.
EQUALS = {
    aten.relu.default: lambda x: (aten.clamp_min.default, (x, 0)),
    aten.mul.Scalar: lambda x, factor: (aten.mul.Tensor, (x, factor)),
    aten.stack.default: lambda tensors, dim=0: (
        aten.cat.default,
        ([tensor.unsqueeze(dim) for tensor in tensors], dim),
    ),
}


class Recorded:
    """A function of one tensor that is recorded in an early call and replayed after that.

    Each call must do the same to the same tensors, its argument apart: what differs between calls
    has to be read from tensors, and Python must not decide anything by a number that was computed.
    What a call leaves for later ones lies in tensors that were there before. Random numbers can be
    drawn on a GPU only; they are those of the seed at the time of the call. On devices other than a
    CPU and an NVIDIA GPU, and where recording fails, the function is called as it is from then on;
    of a failure on a GPU, one line says so.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device):
        self.function = function
        self.device = device.type
        self.calls = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, argument: Tensor) -> Tensor:
        """Return what the function returns, in a tensor of its own."""
        self.calls += 1
        if self.calls == CALLS_BEFORE_RECORDING + 1 and self.device in ("cpu", "cuda"):
            self.argument = argument.clone()
            if self.device == "cpu":
                return self._record_operations()
            self._record_graph()
        if self.replay is None:
            return self.function(argument)
        self.argument.copy_(argument)
        self.replay()
        return self.result.clone()

    def _record_graph(self) -> None:
        try:
            self.replay = self._capture()
        except (MemoryError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            tqdm.write(f"the GPU waits for Python, which is slower: {reason}", file=sys.stderr)

    def _capture(self) -> Callable[[], None]:
        # Its random numbers come from a state of their own: seeds reach the default one only as
        # long as no other recording takes its place. Recording itself computes nothing.
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.argument.device.index]
        state, own = generator.graphsafe_get_state(), generator.clone_state()
        generator.graphsafe_set_state(own)
        try:
            # The outer context goes back to the stream of before even after a failure.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.result = self.function(self.argument)
        finally:
            generator.graphsafe_set_state(state)

        def replay() -> None:
            own.manual_seed(generator.initial_seed())
            graph.replay()

        return replay

    def _record_operations(self) -> Tensor:
        with Operations() as operations:
            self.result = self.function(self.argument).detach()
        # Where memory is short, the step is done all the same, and so are those after it.
        with contextlib.suppress(MemoryError, RuntimeError):
            self.replay = operations.repeater(self.result)
        return self.result.clone()


class Operations(TorchDispatchMode):
    """The operations that torch carries out while it is entered, to be repeated later.

    They are given up, so that there is nothing to repeat, if they keep too much memory or if a
    number is looked at, which would be the same one ever after.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[Call] | None = []
        self.kept_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Or else torch imports its compiler at the first operation, which takes a second.
        return False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.kept_bytes > LARGEST_RECORDING or operation is aten._local_scalar_dense.default:
            self.calls = None
        if self.calls is not None:
            try:
                result = operation(*args, **kwargs)
            except (MemoryError, RuntimeError):
                self.calls = None
        if self.calls is None:
            # If memory ran out, it is free now.
            return operation(*args, **kwargs)
        # Kept as aliases: autograd hands a gradient on, instead of copying it, if no one else
        # holds it.
        self.calls.append((operation, *_changed(Tensor.detach, (args, kwargs, result))))
        if not operation.is_view and not operation._schema.is_mutable:
            self.kept_bytes += sum(tensor.nbytes for tensor in _tensors(result))
        return result

    def repeater(self, kept: Tensor) -> Callable[[], None] | None:
        """Return a function that does again what makes the kept tensor and changes older ones."""
        if self.calls is None:
            return None
        place = _share_memory(self.calls, kept)
        again = []
        for operation, *call in self.calls:
            if not _computes_nothing(operation, *call):
                again.append(_in_place(operation, *_changed(place, call)))

        @torch.no_grad()
        def repeat() -> None:
            for call in again:
                call()

        return repeat


def _share_memory(calls: Sequence[Call], kept: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that gives the tensor to use in place of a recorded one.

    A tensor that no later call needs leaves its memory to later ones of the same size: so a step of
    four layers 64 wide uses a third of the memory, and more of it stays in the processor's cache.
    """
    last_use: dict[int, int] = {}
    made = set()
    for i, (_, args, kwargs, result) in enumerate(calls):
        last_use |= {_memory(tensor): i for tensor in _tensors((args, kwargs))}
        made |= {_memory(tensor) for tensor in _tensors(result)} - last_use.keys()
        last_use |= {_memory(tensor): i for tensor in _tensors(result)}
    made.discard(_memory(kept))
    blocks: dict[int, UntypedStorage] = {}
    free: dict[int, list[UntypedStorage]] = defaultdict(list)
    for i, (_, *call) in enumerate(calls):
        sizes = {_memory(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(call)}
        for memory, size in sizes.items():
            if memory in made and memory not in blocks:
                blocks[memory] = free[size].pop() if free[size] else UntypedStorage(size)
        for memory, size in sizes.items():
            if memory in made and last_use[memory] == i:
                free[size].append(blocks[memory])

    def place(tensor: Tensor) -> Tensor:
        block = blocks.get(_memory(tensor))
        if block is None:
            return tensor
        shape = tensor.storage_offset(), tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(block, *shape)

    return place


def _computes_nothing(operation: OpOverload, args: tuple, kwargs: dict, result: Any) -> bool:
    """Tell whether an operation only allocates, or gives its argument another shape."""
    if operation.__name__.startswith(("empty", "new_empty")):
        return True
    given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
    return not operation._schema.is_mutable and all(_memory(x) in given for x in _tensors(result))


def _in_place(operation: OpOverload, args: tuple, kwargs: dict, result: Any) -> Callable:
    """Return a call that makes a result anew where it lies."""
    if operation._schema.is_mutable:
        return _call(operation, args, kwargs)
    if operation in COPIES:
        return functools.partial(result.copy_, args[0])
    if operation in EQUALS:
        operation, args = EQUALS[operation](*args)
    results = _tensors(result)
    if (form := _out_form(operation)) is not None:
        other, names = form
        return _call(other, args, kwargs, dict(zip(names, results, strict=True)))
    compute = _call(operation, args, kwargs)

    def compute_and_copy() -> None:
        for old, new in zip(results, _tensors(compute()), strict=True):
            old.copy_(new)

    return compute_and_copy


def _call(
    operation: OpOverload, args: tuple, kwargs: dict, out: dict[str, Tensor] | None = None
) -> Callable[[], Any]:
    """Return a call of an operation that writes to some tensors, if any are given by name.

    Torch's Python functions begin a microsecond sooner than its operations: a step of `tiny` takes
    0.92 of the time, and a model 64 wide writes 1.13 times as many characters. They are called
    where one of that name takes these arguments.
    """
    out = out or {}
    plain = functools.partial(operation, *args, **kwargs, **out)
    name = operation._overloadpacket.__name__
    function = getattr(torch, name, getattr(Tensor, name, None))
    if function is None:
        return plain
    outs = tuple(out.values())
    named = {"out": outs[0] if len(outs) == 1 else outs} if out else {}
    quickest = functools.partial(function, *args, **kwargs, **named)

    def call() -> Any:
        nonlocal quickest
        try:
            return quickest()
        except TypeError:
            # Nothing was computed: this is about the arguments.
            quickest = plain
            return plain()

    return call


@functools.cache
def _out_form(operation: OpOverload) -> tuple[OpOverload, list[str]] | None:
    """Return the operation that writes its results into given tensors, and their names in it."""

    def inputs(of: OpOverload) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in of._schema.arguments if not a.is_out]

    for name in operation._overloadpacket.overloads():
        other = getattr(operation._overloadpacket, name)
        outs = [argument.name for argument in other._schema.arguments if argument.is_out]
        if outs and inputs(other) == inputs(operation):
            return other, outs
    return None


def _changed(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value of tuples, lists and dictionaries with each tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_changed(change, part) for part in value)
    if isinstance(value, dict):
        return {name: _changed(change, part) for name, part in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a value of tuples, lists and dictionaries."""
    tensors: list[Tensor] = []
    _changed(lambda tensor: tensors.append(tensor) or tensor, value)
    return tensors


def _memory(tensor: Tensor) -> int:
    """Return what tensors have in common that lie in the same memory."""
    return tensor.untyped_storage()._cdata
