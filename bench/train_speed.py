"""Measure training steps beside a plain loop of the same model and beside their bare products.

python bench/train_speed.py book.txt --preset base    (any text, preset and settings of train.py)
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

import train
from data import draw_batch
from model import GPTConfig
from training import piece_size

ROUNDS = 7


class TextbookGPT(nn.Module):
    """The same network from torch's own layers: SDPA, torch's dropout, one bias more (Q, K, V)."""

    def __init__(self, config: GPTConfig, vocab_size: int):
        super().__init__()
        d = config.n_embd
        self.token_embedding = nn.Embedding(vocab_size, d)
        self.position_embedding = nn.Embedding(config.block_size, d)
        layer = nn.TransformerEncoderLayer(
            d, config.n_head, 4 * d, config.dropout, batch_first=True, norm_first=True
        )
        # torch's layer has one dropout that ours has not, between the two feed-forward layers.
        layer.dropout = nn.Identity()
        norm = nn.LayerNorm(d)
        self.blocks = nn.TransformerEncoder(layer, config.n_layer, norm, enable_nested_tensor=False)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(d, vocab_size)
        mask = nn.Transformer.generate_square_subsequent_mask(config.block_size)
        self.register_buffer("mask", mask)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.token_embedding(ids) + self.position_embedding.weight)
        return self.head(self.blocks(x, self.mask, is_causal=True))


def textbook_step(run: train.Run) -> Callable[[int, int], Tensor]:
    """Return a step of the plain loop: float32, the whole batch at once, AdamW."""
    model = TextbookGPT(run.model.config, run.model.vocab_size).to(run.training_ids.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def take_step(step: int, _: int) -> Tensor:
        inputs, targets = draw_batch(
            run.training_ids, run.config.batch_size, run.model.config.block_size, 1, step
        )
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return take_step


def bare_products(run: train.Run) -> Callable[[int, int], Tensor]:
    """Return a function with the matrix products of a step, forward and backward, and no more."""
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


def main() -> None:
    """Time all three in turn, and say where the time of ours goes."""
    parser = train.command_line()
    with tempfile.TemporaryDirectory() as empty:
        run = train.begin(*parser.parse([*sys.argv[1:], "--out", empty]))
    steps = {
        "chargpt": train.step_function(run),
        "plain loop": textbook_step(run),
        "bare products": bare_products(run),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, take_step in steps.items():
            began = time.perf_counter()
            take_step(number, ROUNDS + 1).item()
            seconds[name].append(time.perf_counter() - began)
    characters = run.config.batch_size * run.model.config.block_size
    ours = seconds["chargpt"][1:]
    print("\n| | ms a step | characters/s | time of chargpt's step : its own |\n|---|---|---|---|")
    for name, all_times in seconds.items():
        # The first round warms up.
        times = all_times[1:]
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(ours, times, strict=True))
        print(f"| {name} | {1000 * median:,.1f} | {characters / median:,.0f} | {ratio:.2f} |")
    with profile() as profiler:
        steps["chargpt"](0, 1).item()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("\nwhere the time goes, on the CPU:")
    for event in events[:10]:
        print(f"{event.self_cpu_time_total / total:6.1%}  {event.key}")


if __name__ == "__main__":
    main()
