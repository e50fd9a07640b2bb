"""What happens between text and weights: one step of training, and one evaluation.

Shapes: B batch, T time (positions), V vocabulary.
"""

import contextlib
import copy
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config.hardware import DoesNotFitError, ran_out_of_memory
from data import draw_starts, evenly_spaced, read_in_order, read_windows, step_seed
from graphs import Recorded
from model import GPT, GPTConfig, dropout_from, long_mask
from optimizer import Optimizer, OptimizerConfig, as_one_vector, parts_of, set_schedule

# How many characters go through the model at once on a CPU: a whole batch of `base` takes more
# memory, and longer, because activations have left the cache when they are needed again.
PIECE_CHARACTERS = 4096
# A thread is worth it for this many activations (batch x context x width). `tiny` has half as many,
# and with two threads, each with half of a batch, a step takes 1.5 times as long.
THREAD_ACTIVATIONS = 2**14
# More parts of a batch than this would wait for Python, which starts their operations one by one.
MOST_PARTS = 4
# Of a text longer than this, evenly spaced stretches that add up to it are evaluated.
EVALUATED_CHARACTERS = 2**18
# The average of the weights looks back on 1 / (this + 1) of the run. From 8 to 20 it makes no
# difference.
AVERAGING_POWER = 16
# Evaluation reads as many characters at once as suit the device, whatever the batch size: so that
# does not change the loss, not even by rounding.
EVALUATION_PIECE_CHARACTERS = {"cpu": 4096, "mps": 4096, "cuda": 32768}

Result = TypeVar("Result")


class Pieces(Protocol):
    """Where a step notes how many windows fit at once since memory ran out; None before that."""

    windows: int | None


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
    the settings, (seed, step) and the number of threads, and on nothing else. The loss is NaN
    if the gradient is not finite. A batch is computed in parts, each by its own threads, and a part
    in pieces, one after another; the optimizers are divided between these threads, too. Where
    memory runs out, pieces are smaller from then on, and only optimizers still go side by side;
    DoesNotFitError says what would fit if not even one window does. The average is brought into a
    vector: a function made for it earlier no longer updates it.
    """
    on_cpu = ids.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    # The optimizers keep the weights in vectors, and what belongs to them lies in the same order.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in groups for parameter in group["params"]]
    sizes = [len(group["weights"]) for group in groups]

    def parameters_of(network: GPT) -> list[nn.Parameter]:
        return [network.get_parameter(name) for name in order]

    def by_optimizer(vector: Tensor) -> list[list[Tensor]]:
        part = iter(vector.split(sizes))
        return [[next(part) for _ in optimizer.param_groups] for optimizer in optimizers]

    weights = [[group["weights"] for group in of.param_groups] for of in optimizers]
    averaged = by_optimizer(as_one_vector(parameters_of(average)))
    # Weights are kept and moved in float32. In a lower precision, a copy of them does the
    # arithmetic: that saves autocast's conversions, a tenth of a step of `small` on a CPU.
    network = model if precision == torch.float32 else copy.deepcopy(model).to(precision)
    network_weights = parameters_of(network)
    if network is not model:
        copies = by_optimizer(as_one_vector(network_weights))
    block_size = model.config.block_size
    usual = piece_size(batch_size, block_size, ids.device)
    average_share = torch.zeros((), device=ids.device)
    n_parts, threads = divide_among_threads(batch_size, model.config, ids.device)
    pool = ThreadPoolExecutor(n_parts, initializer=set_own_threads, initargs=(threads,))
    # Each part of a batch has a gradient of its own: one long vector in float32, so that adding up,
    # norm and clipping are one operation each.
    gradients = [torch.zeros(sum(sizes), device=ids.device) for _ in range(n_parts)]
    clipped = by_optimizer(gradients[0])
    # So that what dropout draws does not depend on which part is the first to draw.
    generators = [torch.Generator() for _ in range(n_parts)]

    def loss_and_gradient(inputs: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = network(inputs)  # (B, T, V)
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        loss = total / (batch_size * block_size)
        return loss.detach(), torch.autograd.grad(loss, network_weights)

    def write_gradient(
        gradient: list[Tensor], generator: torch.Generator, starts: Tensor
    ) -> Tensor:
        """Write the gradient of windows, weight by weight; return what they add to the loss."""
        loss = 0.0
        at_once = pieces.windows or math.ceil(usual / n_parts)
        for i, piece in enumerate(starts.split(at_once)):
            inputs, targets = read_windows(ids, piece, block_size)  # (B, T) each
            with dropout_from(generator):
                piece_loss, piece_gradient = loss_and_gradient(inputs, targets)
            write = torch._foreach_add_ if i else torch._foreach_copy_
            write(gradient, piece_gradient)
            loss = loss + piece_loss
        return loss

    def clip_gradient(loss: Tensor) -> Tensor:
        """Add up the gradients of the parts, in the first; clip the sum, and return the loss."""
        first, *others = gradients
        for gradient in others:
            first += gradient
        norm = first.norm()
        first *= (config.grad_clip / (norm + 1e-6)).clamp(max=1)
        # What is added is 0, or NaN if the norm is not finite.
        return loss + 0 * norm

    def update_weights(indices: Sequence[int], loss: Tensor) -> Tensor:
        """Let some optimizers move their weights, and move the average; return the loss."""
        for i in indices:
            optimizers[i].step(clipped[i])
            update_average(averaged[i], weights[i], average_share)
            if network is not model:
                torch._foreach_copy_(copies[i], weights[i])
        return loss

    shares = [range(i, len(optimizers), n_parts) for i in range(n_parts)]
    clip = Recorded(clip_gradient, ids.device)
    updates = [Recorded(partial(update_weights, share), ids.device) for share in shares if share]

    def make_parts() -> list[Callable[[Tensor], Tensor]]:
        functions = [
            partial(write_gradient, parts_of(gradient, network_weights), generator)
            for gradient, generator in zip(gradients, generators, strict=True)
        ]
        if on_cpu and model.config.dropout:
            # Python draws where masks are cut: a recording would repeat that.
            return functions
        return [Recorded(function, ids.device) for function in functions]

    parts = make_parts()

    def compute_gradients(step: int, starts: Tensor, windows: int) -> Tensor:
        """Compute the parts of a batch, `windows` windows at once, and return the loss."""
        if windows < (pieces.windows or usual):
            pieces.windows = windows
            parts[:] = make_parts()  # those of before read more windows at once
        if model.config.dropout:
            if not on_cpu:
                # A GPU's dropout draws from torch's own generator. (Seeding it takes 0.2 ms.)
                torch.manual_seed(step_seed(seed, step))
            long_mask.cache_clear()
            for part, generator in enumerate(generators):
                generator.manual_seed(step_seed(seed, step, part))
        tasks = [
            partial(part, some)
            for part, some in zip(parts, starts.tensor_split(n_parts), strict=True)
        ]
        return sum([task() for task in tasks] if pieces.windows else side_by_side(tasks, pool))

    def take_step(step: int, max_steps: int) -> Tensor:
        set_schedule(optimizers, step, max_steps, config)
        average_share.fill_(averaging_share(step))
        starts = draw_starts(len(ids), batch_size, block_size, seed, step)  # (B,)
        if ids.is_cuda:
            # From ordinary memory, a copy to the GPU waits until the GPU is done.
            starts = starts.pin_memory()
        starts = starts.to(ids.device, non_blocking=True)
        before = pieces.windows or usual
        loss, now = halve_until_it_fits(partial(compute_gradients, step, starts), before)
        if loss is None:
            inputs, targets = read_windows(ids, starts[:1], block_size)
            _, length = halve_until_it_fits(
                lambda length: loss_and_gradient(inputs[:, :length], targets[:, :length]),
                block_size // 2,
            )
            fits = f"with --block_size {length} fits" if length else "needs a smaller model"
            raise DoesNotFitError(
                f"memory does not suffice for one window of {block_size} characters; "
                f"a new run {fits}"
            )
        if now < before:
            note = f"memory ran out: from here on {now} instead of {before} windows"
            tqdm.write(f"{note} go through the model at once", file=sys.stderr)
        loss = clip(loss)
        return side_by_side([partial(update, loss) for update in updates], pool)[0]

    # What the pool does not do has no more threads than that, either.
    return on_threads(n_parts * threads)(take_step) if on_cpu else take_step


def divide_among_threads(
    batch_size: int, config: GPTConfig, device: torch.device
) -> tuple[int, int]:
    """Return into how many parts a batch is divided, and how many threads compute each of them.

    Threads that share every operation wait for each other hundreds of times in a step. Where each
    has a part of the batch instead, they do so twice: on two cores, a step of `mini` takes 0.9 of
    the time, and 0.8 beside a busy program.
    """
    activations = batch_size * config.block_size * config.n_embd
    threads = max(1, min(torch.get_num_threads(), activations // THREAD_ACTIVATIONS))
    most = min(MOST_PARTS, piece_size(batch_size, config.block_size, device))
    if device.type != "cpu":
        most = 1
    n_parts = max(n for n in range(1, most + 1) if threads % n == 0)
    return n_parts, threads // n_parts


def side_by_side(tasks: Sequence[Callable[[], Result]], pool: ThreadPoolExecutor) -> list[Result]:
    """Return the results of tasks that a pool carries out; all are over if one of them fails.

    A single task is carried out in this thread.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    futures: list[Future[Result]] = []
    try:
        try:
            futures.extend(map(pool.submit, tasks))
        finally:
            wait(futures)  # also if there was no room for another thread
        return list(map(Future.result, futures))
    finally:
        # An error and its future hold each other, and all that was allocated when it happened.
        del futures


def averaging_share(step: int) -> float:
    """Return how far the averaged weights move towards those after a step.

    The weights of step t count in proportion to t^16 ("Stochastic Gradient Descent for Non-smooth
    Optimization", Shamir and Zhang, 2013, section 4). The average is what is evaluated and kept,
    because it overfits a short text later. Four layers 64 wide, trained on an eighth of
    Shakespeare, are at best at 2.14 instead of 2.20 nats; where a text is read a few times, it
    changes nothing.
    """
    return (AVERAGING_POWER + 1) / (step + 1 + AVERAGING_POWER)


def update_average(averaged: Sequence[Tensor], weights: Sequence[Tensor], share: Tensor) -> None:
    """Move averaged weights towards others by a share, a scalar."""
    torch._foreach_lerp_(averaged, weights, [share] * len(averaged))


def keep_freed_memory() -> None:
    """Let memory that is freed stay with this process.

    By default, glibc gives large blocks back to the system and gets them anew, page by page: a
    hundred thousand pages in a step of `base`, 2 % of its processor time. (A step that is
    recorded allocates next to nothing.) Threads other than the first keep it in heaps of at most
    64 MB, and give back a whole one unless the one before has no room left for M_TOP_PAD:
    evaluating `small` on 6,000 different characters would take 1.2 times as long. Where each has
    heaps of its own, such evaluations take up to 500 MB more.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return  # not glibc
    # Their numbers in malloc.h.
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    # Older versions of glibc take no more than 32 MB for the second one.
    if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**26)
        libc.mallopt(arena_max, 1)


def set_own_threads(n: int) -> None:
    """Let n threads share what this thread computes from now on."""
    # In a new thread, the first look at its number takes over the one last set in any thread, so it
    # comes first. Without it, in one run of 30, a part was computed with the main thread's number.
    torch.get_num_threads()
    torch.set_num_threads(n)


@contextlib.contextmanager
def on_threads(n: int) -> Iterator[None]:
    """Compute on n threads for as long as it is entered."""
    threads = torch.get_num_threads()
    torch.set_num_threads(n)
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
            if not ran_out_of_memory(error):
                raise
        # Not in the clause above: there, the error still holds what the attempt has allocated.
        size //= 2
    return None, 0


def nats_and_bits(loss: float) -> str:
    """Write a loss in both units of information."""
    return f"{loss:.4f} nats, {loss / math.log(2):.4f} bits per character"


def bits_per_byte(loss: float, text: str) -> float:
    """Return a loss in nats per character of a text in bits per byte, to compare languages."""
    return loss / math.log(2) * len(text) / len(text.encode())


def evaluate(model: GPT, ids: Tensor, precision: torch.dtype) -> float:
    """Return the mean loss over a text in nats per character, without any random draw.

    Raises DoesNotFitError if not even one window fits.
    """
    return character_losses(model, ids, precision).cpu().double().mean().item()


def character_losses(model: GPT, ids: Tensor, precision: torch.dtype) -> Tensor:
    """Return the loss of each character of a text that `evaluate` is the mean of, (N,) in nats.

    The first has none, and of a long text only some stretches are read. Threads have parts of a
    batch as they have in a step: on two cores, that takes 0.7 to 0.9 of the time. Where memory
    runs out, batches are smaller and in one part.
    """
    ids, block_size = evenly_spaced(ids, EVALUATED_CHARACTERS), model.config.block_size
    usual = max(1, EVALUATION_PIECE_CHARACTERS[ids.device.type] // block_size)
    n_parts, threads = divide_among_threads(usual, model.config, ids.device)

    @torch.no_grad()
    def losses_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
            logits = model(inputs).float()  # (B, T, V)
        flat = logits.flatten(0, 1), targets.flatten()
        return F.cross_entropy(*flat, reduction="none")  # (B * T,)

    def read(batch_size: int) -> Tensor:
        # Allocated first: results kept of each batch would lie between pieces of memory that the
        # next one could use. With 6,000 different characters, `medium` took 5.4 GB here, not 0.8.
        losses, n_read = torch.empty(len(ids) - 1, device=ids.device), 0
        for inputs, targets in read_in_order(ids, block_size, batch_size):
            size = math.ceil(usual / n_parts) if batch_size == usual else batch_size
            parts = zip(inputs.split(size), targets.split(size), strict=True)
            tasks = [partial(losses_of, *part) for part in parts]
            n = targets.numel()
            losses[n_read : n_read + n] = torch.cat(side_by_side(tasks, pool))
            n_read += n
        return losses

    model.eval()
    with ThreadPoolExecutor(n_parts, initializer=set_own_threads, initargs=(threads,)) as pool:
        losses, _ = halve_until_it_fits(read, usual)
    model.train()
    if losses is None:
        raise DoesNotFitError(
            f"memory does not suffice to evaluate one window of {block_size} characters"
        )
    return losses
