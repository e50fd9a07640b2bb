"""Train presets on texts and print the README's table of them, and of simpler models.

python bench/presets.py --texts book.txt python --presets tiny:1 small:3

A preset comes with its minutes; the text "python" is the source of Python's own library.
"""

import argparse
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import Parser, output_of

import train
from checkpoint import LAST, load_checkpoint, read_log


@dataclass(frozen=True)
class Result:
    """What came of training once."""

    nats: float
    parameters: int
    minutes: float
    characters_per_second: float
    readings: float
    # The nats of simpler models, by their names.
    baselines: dict[str, float]


def measure(text: str, preset: str, minutes: str) -> Result:
    """Train a preset on a text for so many minutes."""
    with tempfile.TemporaryDirectory() as folder:
        words = [] if text == "python" else [text]
        words += ["--preset", preset, "--minutes", minutes, "--out", folder]
        began = time.perf_counter()
        command = [sys.executable, train.__file__, *words]
        said = output_of(command)
        took = (time.perf_counter() - began) / 60
        last = load_checkpoint(Path(folder, LAST))
        seconds = read_log(Path(folder))[-1]["seconds"]
    batch = last.settings["train"]["batch_size"] * last.model.config.block_size
    characters, (parameters, _) = last.progress.step * batch, last.model.count_parameters()
    (line,) = re.findall("^bits per character, .*: (.*?);", said, re.MULTILINE)
    bits = dict(pair.rsplit(" ", 1) for pair in line.split(", "))
    return Result(
        last.progress.best_loss,
        parameters,
        took,
        characters / seconds,
        characters / (0.9 * last.text["characters"]),
        {name: float(value) * math.log(2) for name, value in bits.items()},
    )


def preset_and_minutes(word: str) -> tuple[str, str]:
    """Split "small:3"."""
    preset, colon, minutes = word.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"'{word}' is not a preset with its minutes, as in mini:1")
    return preset, minutes


def main() -> None:
    """Run train.py for each preset and text, one after the other; a row for each preset."""
    parser = Parser(__doc__)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", type=preset_and_minutes, required=True)
    arguments = parser.parse_args()
    names = [Path(text).stem for text in arguments.texts]
    print("losses in nats; all else is that of the first text")
    print(f"| preset | parameters | minutes | characters/s | readings | {' | '.join(names)} |")
    print("|---" * (5 + len(names)) + "|")
    for preset, minutes in arguments.presets:
        results = [measure(text, preset, minutes) for text in arguments.texts]
        first = results[0]
        losses = " | ".join(f"{result.nats:.3f}" for result in results)
        print(
            f"| `{preset}` | {first.parameters:,} | {first.minutes:.2f} "
            f"| {first.characters_per_second:,.0f} | {first.readings:.2g} | {losses} |",
            flush=True,
        )
    for name in first.baselines:
        losses = " | ".join(f"{result.baselines[name]:.3f}" for result in results)
        print(f"| {name} | | | | | {losses} |")


if __name__ == "__main__":
    main()
