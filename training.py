"""What happens between text and weights: one step of training, and one evaluation.

Shapes: B batch, T time (positions), V vocabulary.
"""

import contextlib
import copy
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from config import DoesNotFitError, ran_out_of_memory
from data import draw_starts, read_in_order, read_windows, step_seed
from graphs import Recorded, recording_on_gpu
from model import GPT
from optimizer import Optimizer, OptimizerConfig, set_schedule

# How many characters go through the model at once on a CPU: a whole batch of `base` takes longer,
# because what is computed is no longer in the cache when it is needed again, and more memory.
PIECE_CHARACTERS = 4096
# A batch with fewer activations in a layer than this is not worth a second thread.
SHARED_ACTIVATIONS = 2**16
# A validation part longer than this is read in evenly spaced windows that add up to it.
EVALUATED_CHARACTERS = 2**18
# The higher, the shorter is what the average of the weights looks back on: here, a seventeenth of
# the run. From 8 to 20 it makes no difference.
AVERAGING_POWER = 16
# How much evaluation reads at once depends on the device only, and so does its result.
EVALUATION_BATCH = {"cpu": 4096, "mps": 4096, "cuda": 32768}

Result = TypeVar("Result")


@dataclass
class Pieces:
    """How many windows of a batch go through the model at once; fewer when memory runs out."""

    windows: int
    reduced: bool = False


def make_step(
    model: GPT,
    average: GPT,
    optimizers: Sequence[Optimizer],
    config: OptimizerConfig,
    ids: Tensor,
    batch_size: int,
    seed: int,
    precision: torch.dtype,
    pieces: Pieces,
) -> Callable[[int, int], Tensor]:
    """Return the function that makes one step of training and returns its loss, a scalar.

    It is called with step and max_steps. What happens depends on the weights, the optimizers,
    the settings and (seed, step), and on nothing else. The loss is not a number if the gradient
    is not finite. Where memory runs out, the batch goes through the model in smaller pieces from
    then on; DoesNotFitError says what would fit if not even one window does.
    """
    if ids.device.type == "cpu":
        keep_freed_memory()
    weights = list(model.parameters())
    # Weights are kept and moved in float32. In a lower precision, a copy of them does the
    # arithmetic: that saves autocast's conversions, a tenth of a step of `small` on a CPU.
    worker = model if precision == torch.float32 else copy.deepcopy(model).to(precision)
    copies = list(worker.parameters())
    block_size = model.config.block_size
    share = torch.zeros((), device=ids.device)

    def leave_gradient(inputs: Tensor, targets: Tensor, windows: int) -> Tensor:
        """Compute the gradient of a batch, so many windows at a time, and return its loss."""
        if model.config.dropout and windows < pieces.windows:
            torch.manual_seed(torch.initial_seed())  # again, as in the attempt that did not fit
        mean = torch.zeros((), device=ids.device)
        for weight in (*weights, *copies):
            weight.grad = None
        for x, y in zip(inputs.split(windows), targets.split(windows), strict=True):
            logits = worker(x)  # (B, T, V)
            total = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
            loss = total / targets.numel()
            loss.backward()
            mean += loss.detach()
            if worker is not model:
                # Pieces are added up in float32.
                for weight, copied in zip(weights, copies, strict=True):
                    gradient, copied.grad = copied.grad.float(), None
                    weight.grad = gradient if weight.grad is None else weight.grad + gradient
        return mean

    def move(starts: Tensor) -> Tensor:
        """Do all of a step that can be recorded, on windows that start there; return the loss."""
        inputs, targets = read_windows(ids, starts, block_size)  # (B, T) each
        loss, windows = halve_until_it_fits(
            partial(leave_gradient, inputs, targets), pieces.windows
        )
        if loss is None:
            _, length = halve_until_it_fits(
                lambda length: leave_gradient(inputs[:1, :length], targets[:1, :length], 1),
                block_size // 2,
            )
            would = f"--block_size {length} fits" if length else "make the model smaller"
            raise DoesNotFitError(
                f"memory does not suffice for one window of {block_size} characters; {would}"
            )
        if windows < pieces.windows:
            note = f"memory ran out: from here on {windows} instead of {pieces.windows} windows"
            tqdm.write(f"{note} go through the model at once", file=sys.stderr)
            pieces.windows, pieces.reduced = windows, True
        norm = torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, share)
        for weight in weights:
            weight.grad = None
        if worker is not model:
            with torch.no_grad():
                torch._foreach_copy_(copies, weights)
        # That adds nothing, but if the norm is not finite, it makes the loss not a number.
        return loss + 0 * norm

    on_cpu = ids.device.type == "cpu"
    # On a CPU, Python decides where dropout masks are cut.
    if not (on_cpu and model.config.dropout):
        move = Recorded(move, ids.device)

    def take_step(step: int, max_steps: int) -> Tensor:
        if model.config.dropout:
            # Dropout draws from torch's own generator. (Seeding it takes 0.2 ms.)
            torch.manual_seed(step_seed(seed, step))
        set_schedule(optimizers, step, max_steps, config)
        share.fill_(averaging_share(step))
        starts = draw_starts(len(ids), batch_size, block_size, seed, step)  # (B,)
        if ids.is_cuda:
            # From ordinary memory, a copy to the GPU waits until the GPU is done.
            starts = starts.pin_memory()
        return move(starts.to(ids.device, non_blocking=True))

    activations = batch_size * block_size * model.config.n_embd
    if on_cpu and activations < SHARED_ACTIVATIONS:
        return one_thread()(take_step)
    return take_step


def averaging_share(step: int) -> float:
    """Return how far the averaged weights move towards those after a step.

    The weights of step t count in proportion to t^16 ("Stochastic Gradient Descent for Non-smooth
    Optimization", Shamir and Zhang, 2013, section 4). The average is evaluated and kept: it learns
    a short text by heart later. `mini` is at 2.14 instead of 2.20 nats after reading an eighth of
    Shakespeare for as long as that helps; where a text is read a few times, it changes nothing.
    """
    return (AVERAGING_POWER + 1) / (step + 1 + AVERAGING_POWER)


@torch.no_grad()
def update_average(average: GPT, model: GPT, share: Tensor) -> None:
    """Move averaged weights towards those of a model by a share, a scalar."""
    averaged = list(average.parameters())
    torch._foreach_lerp_(averaged, list(model.parameters()), [share] * len(averaged))


def keep_freed_memory() -> None:
    """Let memory that is freed stay with this process.

    By default, glibc gives large blocks back to the system and gets them anew, page by page, in
    every step: that takes a tenth of a step of `small` and of `base`, a fifth of one of `mini`.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return  # not glibc
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    # Older versions of glibc take no more than 32 MB for the second one.
    if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
        libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread for as long as it is entered.

    Threads wait for each other after every operation: with two of them, a step of `tiny` takes
    1.3 times as long as with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def piece_size(batch_size: int, block_size: int, device: torch.device) -> int:
    """Return how many windows of a batch go through the model at once."""
    if device.type != "cpu":
        return batch_size
    return min(batch_size, max(1, PIECE_CHARACTERS // block_size))


def halve_until_it_fits(
    attempt: Callable[[int], Result], size: int
) -> tuple[Result, int] | tuple[None, int]:
    """Return attempt(size) and the size: half, a quarter, ... of the one given if memory runs out.

    It is (None, 0) if it runs out with size 1, too.
    """
    while size:
        try:
            return attempt(size), size
        except (MemoryError, RuntimeError) as error:
            # Recording on a GPU needs memory of its own: it is given up, and the step made without.
            if recording_on_gpu() or not ran_out_of_memory(error):
                raise
        # Not in the clause above: there, the error still holds what the attempt has allocated.
        size //= 2
    return None, 0


def evaluate(model: GPT, ids: Tensor, precision: torch.dtype) -> float:
    """Return the mean loss over a text in nats per character, without any random draw.

    Raises DoesNotFitError if not even one window fits.
    """
    return character_losses(model, ids, precision).cpu().double().mean().item()


@torch.no_grad()
def character_losses(model: GPT, ids: Tensor, precision: torch.dtype) -> Tensor:
    """Return the loss of each character of a text that `evaluate` is the mean of, (N,) in nats."""
    block_size = model.config.block_size

    def read(batch_size: int) -> Tensor:
        losses = []
        for inputs, targets in read_in_order(ids, block_size, batch_size, EVALUATED_CHARACTERS):
            with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
                logits = model(inputs).float()  # (B, T, V)
            flat = logits.flatten(0, 1), targets.flatten()
            losses.append(F.cross_entropy(*flat, reduction="none"))  # (B * T,)
        return torch.cat(losses)

    model.eval()
    at_once = EVALUATION_BATCH[ids.device.type] // block_size
    losses, _ = halve_until_it_fits(read, max(1, at_once))
    model.train()
    if losses is None:
        raise DoesNotFitError(
            f"memory does not suffice to evaluate one window of {block_size} characters"
        )
    return losses
