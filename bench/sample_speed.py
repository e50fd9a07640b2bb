"""Measure how fast a preset writes after a prompt as long as its context, one text and many.

python bench/sample_speed.py base 64

Beside it, one text without the cache, for which every character reads the context again.
"""

import contextlib
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import parse, whole_number

import train  # before torch, because it says how threads wait

# isort: split
import torch

from config import build, load_preset
from config.hardware import choose_device
from config.script import bad_input_exits
from model import GPT, SamplingConfig

VOCABULARY = 65
LENGTH = 500  # characters, as sample.py writes
ROUNDS = 3


def characters_per_second(model: GPT, texts: int, cached: bool) -> float:
    """Write texts from their first character to their last."""
    device = model.head.weight.device
    prompt = torch.zeros(texts, model.config.block_size, dtype=torch.long, device=device)
    generators = [torch.Generator(device).manual_seed(i) for i in range(texts)]
    began = time.perf_counter()
    with contextlib.closing(model.generate(prompt, SamplingConfig(), generators, cached)) as stream:
        for ids in itertools.islice(stream, LENGTH):
            ids.tolist()
    return texts * LENGTH / (time.perf_counter() - began)


def main() -> None:
    """Time all of it in turn and print the medians."""
    asked = parse(__doc__, preset=str, texts=whole_number)
    preset, texts = asked.preset, asked.texts
    with bad_input_exits("sample_speed.py"):
        model_config, *_ = build(train.SECTIONS, load_preset(preset, train.SECTIONS))
    device, _ = choose_device("auto")
    model = GPT(model_config, VOCABULARY).to(device)
    ways = {
        "one text without the cache": (1, False),
        "one text": (1, True),
        f"{texts} texts side by side": (texts, True),
    }
    speeds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            speeds[name].append(characters_per_second(model, *way))
    slowest = next(iter(speeds.values()))
    print(f"{preset}, context {model_config.block_size}, {VOCABULARY} different characters")
    for name, measured in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(measured, slowest, strict=True))
        print(f"{statistics.median(measured):10,.0f} characters/s, {ratio:5.1f} times: {name}")
    print(f"on {device}")


if __name__ == "__main__":
    main()
