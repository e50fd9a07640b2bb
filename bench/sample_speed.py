"""Measure how fast a preset writes near the end of its context, with the cache and without it.

python bench/sample_speed.py base
"""

import contextlib
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from config import build, load_preset
from model import GPT, SamplingConfig

VOCABULARY = 65
ROUNDS = 5


def characters_per_second(model: GPT, count: int, cached: bool) -> float:
    """Write the last `count` characters that fit into the context, the first one not counted."""
    prompt = torch.zeros(1, model.config.block_size - count, dtype=torch.long)
    with contextlib.closing(model.generate(prompt, SamplingConfig(), cached=cached)) as stream:
        next(stream)
        began = time.perf_counter()
        for _ in itertools.islice(stream, count):
            pass
        return count / (time.perf_counter() - began)


def main() -> None:
    """Time both ways in turn and print their medians."""
    preset = sys.argv[1]
    model_config, *_ = build(train.SECTIONS, load_preset(preset, train.SECTIONS))
    model, count = GPT(model_config, VOCABULARY), model_config.block_size // 8
    rounds = [
        (characters_per_second(model, count, True), characters_per_second(model, count, False))
        for _ in range(ROUNDS)
    ]
    cached, uncached = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    ratio = statistics.median(fast / slow for fast, slow in rounds)
    print(f"{preset}, context {model_config.block_size}, {VOCABULARY} different characters, CPU:")
    print(f"{cached:,.0f} characters/s with the cache, {uncached:,.1f} without, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
