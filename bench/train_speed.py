"""Measure training steps beside a plain loop of the same model and beside their bare products.

python bench/train_speed.py book.txt --preset base    (any settings of train.py; Linux)
"""

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from command_line import end_if_failed, parse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import _ExperimentalConfig, profile

import model
import train
from compare import flops_per_character
from config.script import bad_input_exits
from data import draw_starts, read_windows
from training import keep_freed_memory, piece_size

ROUNDS = 7
SECONDS = 1.0  # that each of them makes steps for in a round, at least


def textbook_step(run: train.Run) -> Callable[[int, int], Tensor]:
    """Return a step of the plain loop: float32, whole batch, torch's SDPA, dropout and AdamW."""
    # Nothing else runs in this process, so the network itself can be made of torch's functions.
    model.attention = lambda query, key, value, _, dropout: F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True
    )
    model.drop = F.dropout
    gpt = run.model
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4)

    def take_step(step: int, _: int) -> Tensor:
        ids, block_size = run.training_ids, gpt.config.block_size
        starts = draw_starts(len(ids), run.config.batch_size, block_size, 1, step)
        inputs, targets = read_windows(ids, starts.to(ids.device), block_size)
        loss = F.cross_entropy(gpt(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return take_step


def bare_products(run: train.Run) -> Callable[[int, int], Tensor]:
    """Return a function with the matrix products of a step, forward and backward, and no more."""
    keep_freed_memory()
    config, device = run.model.config, run.training_ids.device
    windows = piece_size(run.config.batch_size, config.block_size, device)
    pieces = run.config.batch_size / windows
    T, H, D = config.block_size, config.n_head, config.n_embd // config.n_head
    make = {"dtype": run.precision, "device": device}
    linear = [
        (torch.randn(windows * T, layer.in_features, **make), layer.weight.to(run.precision))
        for layer in run.model.modules()
        if isinstance(layer, nn.Linear)
    ]
    heads = torch.randn(windows * H, T, D, **make)
    weights = torch.randn(windows * H, T, T, **make)

    def multiply(*_: int) -> Tensor:
        for _ in range(round(pieces)):
            for x, weight in linear:
                y = x @ weight.T
                y @ weight, y.T @ x  # the gradients of x and of weight
            for _ in range(config.n_layer):
                for _ in range(2):
                    heads @ heads.mT
                for _ in range(2):
                    weights @ heads, weights.mT @ heads
        return y.sum()

    return multiply


STEPS = {
    "chargpt": train.step_function,
    "plain loop": textbook_step,
    "bare products": bare_products,
}


def serve(name: str, words: list[str], pipe: Connection) -> None:
    """Set up one kind of step, then at each request time it and answer with the peak memory."""
    with tempfile.TemporaryDirectory() as empty, bad_input_exits("train_speed.py"):
        run = train.begin(*train.command_line().parse([*words, "--out", empty]))
    characters = run.config.batch_size * run.model.config.block_size
    pipe.send((characters, flops_per_character(run.model.config, run.model.vocab_size)))
    if name != "chargpt":
        run.optimizers = []  # what they remember would count as memory of the others
    take_step, on_gpu = STEPS[name](run), run.training_ids.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    while pipe.recv() == "go":
        began, steps, seconds = time.perf_counter(), 0, 0.0
        while seconds < SECONDS:
            loss = take_step(steps, 1_000_000)
            steps += 1
            # As in training, a GPU is waited for now and then only.
            if not on_gpu or steps % 10 == 0:
                loss.item()
                seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes, on Linux
        pipe.send((seconds / steps, torch.cuda.max_memory_allocated() if on_gpu else peak))
    if name == "chargpt":
        show_profile(lambda: take_step(0, 1).item(), "CUDA" if on_gpu else "CPU")


def show_profile(work: Callable[[], object], kind: str) -> None:
    """Print where the time of something goes on a kind of device, CPU or CUDA."""
    all_threads = _ExperimentalConfig(profile_all_threads=True)
    with profile(experimental_config=all_threads) as profiler:
        work()
    events = [event for event in profiler.key_averages() if event.device_type.name == kind]
    of = "self_cpu_time_total" if kind == "CPU" else "self_device_time_total"
    times = sorted(((getattr(event, of), event.key) for event in events), reverse=True)
    total = sum(microseconds for microseconds, _ in times)
    print(f"\nwhere the time of chargpt goes ({kind}):")
    for microseconds, name in times[:10]:
        print(f"{microseconds / total:6.1%}  {name[:90]}")


def main() -> None:
    """Time all three in turn, each in a process of its own, so that each has its own memory."""
    asked = parse(__doc__, "settings of train.py", text=str)
    words = [asked.text, *asked.words]
    context = multiprocessing.get_context("spawn")
    pipes, processes, answers = {}, {}, {name: [] for name in STEPS}

    def receive(name: str) -> tuple:
        try:
            return pipes[name].recv()
        except EOFError:
            processes[name].join()
            end_if_failed(processes[name].exitcode)
            raise

    for name in STEPS:
        pipes[name], end = context.Pipe()
        # Daemons, so that when one fails the others end, too.
        processes[name] = context.Process(target=serve, args=(name, words, end), daemon=True)
        processes[name].start()
        # The first is chargpt; threads of the others wait for each other as torch has them wait.
        os.environ.pop("GOMP_SPINCOUNT", None)
        os.environ.pop("KMP_BLOCKTIME", None)
        end.close()  # so that it is noticed here when the process fails
        characters, flops = receive(name)
    for _ in range(ROUNDS + 1):
        for name, pipe in pipes.items():
            pipe.send("go")
            answers[name].append(receive(name))
    # The first round warms up.
    seconds = {name: [s for s, _ in answers[name][1:]] for name in STEPS}
    print("\n| | ms a step | characters/s | GFLOP/s | chargpt's time : this | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for name, times in seconds.items():
        median, (_, peak) = statistics.median(times), answers[name][-1]
        ratio = statistics.median(a / b for a, b in zip(seconds["chargpt"], times, strict=True))
        print(
            f"| {name} | {1000 * median:,.1f} | {characters / median:,.0f} "
            f"| {flops * characters / median / 1e9:,.0f} | {ratio:.2f} | {peak / 1e6:,.0f} |",
            flush=True,
        )
    for name, process in processes.items():
        pipes[name].send("stop")
        process.join()


if __name__ == "__main__":
    main()
