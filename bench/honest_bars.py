"""See how often compare.py tells presets apart that differ in their seeds only.

python bench/honest_bars.py book.txt 20 --presets mini --chars 300000    (the one preset)

It is right if that happens in 1 of 20 comparisons. The runs are kept in out/honest-bars.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import replace

import torch
from command_line import parse, whole_number

import compare
from data import TextConfig, Vocabulary, read_text
from measurement import Measured, Parts, measure, summarize

OUT = Path("out/honest-bars")


def told_apart(first: list[Measured], second: list[Measured]) -> bool:
    """Tell whether two sets of runs are called different presets' work."""
    runs = [
        replace(run, row=replace(run.row, name=name))
        for name, of in (("a", first), ("b", second))
        for run in of
    ]
    return any(row.verdict == "" for row in summarize(runs))


def main() -> None:
    """Train four runs for each pair of presets with two seeds, and judge them in groups."""
    asked = parse(__doc__, "arguments of compare.py", text=str, pairs=whole_number)
    path, n = asked.text, asked.pairs
    if compare.main([path, *asked.words, "--seeds", str(4 * n), "--out", str(OUT)]):
        sys.exit(1)
    text = read_text([path], TextConfig())
    vocabulary = Vocabulary.of_counts(text.counts, 1)
    folders = sorted(OUT.glob("*-seed*"))
    if len(folders) != 4 * n:
        sys.exit(f"{OUT} holds other runs, too; remove it")
    device = torch.device("cpu")
    parts = Parts.of(text, vocabulary, device, longest=1)
    runs = [measure("", folder, parts, device) for folder in folders]
    for seeds in (1, 2):
        groups = [runs[i : i + seeds] for i in range(0, len(runs), seeds)]
        pairs = list(zip(groups[::2], groups[1::2], strict=True))
        apart = sum(told_apart(*pair) for pair in pairs)
        print(
            f"{seeds} seed{'s' * (seeds > 1)} each: {len(pairs) - apart} of {len(pairs)} pairs "
            "are not distinguishable"
        )
    losses = torch.stack([run.losses.mean() for run in runs])
    print(f"standard deviation over {len(runs)} seeds: {losses.std():.4f} nats")


if __name__ == "__main__":
    main()
