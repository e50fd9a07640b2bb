"""Train presets on texts and print the README's table of them.

python bench/presets.py --texts book.txt python --presets tiny:1 small:3

A preset comes with its minutes; the text "python" is the source of Python's own library.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from checkpoint import LAST, load_checkpoint, read_log


def measure(text: str, preset: str, minutes: str) -> tuple[float, int, float, float, float]:
    """Train once; return nats, parameters, minutes, characters per second and readings."""
    with tempfile.TemporaryDirectory() as run:
        words = [] if text == "python" else [text]
        words += ["--preset", preset, "--minutes", minutes, "--out", run]
        began = time.perf_counter()
        command = [sys.executable, train.__file__, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took = (time.perf_counter() - began) / 60
        last = load_checkpoint(Path(run, LAST))
        seconds = read_log(Path(run))[-1]["seconds"]
    batch = last.settings["train"]["batch_size"] * last.model.config.block_size
    characters, (parameters, _) = last.progress.step * batch, last.model.count_parameters()
    readings = characters / (0.9 * last.text["characters"])
    return last.progress.best_loss, parameters, took, characters / seconds, readings


def main() -> None:
    """Run train.py for each preset and text, one after the other; a row for each preset."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", required=True)
    arguments = parser.parse_args()
    names = [Path(text).stem for text in arguments.texts]
    print("losses in nats; all else is that of the first text")
    print(f"| preset | parameters | minutes | characters/s | readings | {' | '.join(names)} |")
    print("|---" * (5 + len(names)) + "|")
    for job in arguments.presets:
        preset, minutes = job.split(":")
        results = [measure(text, preset, minutes) for text in arguments.texts]
        _, parameters, took, speed, readings = results[0]
        losses = " | ".join(f"{result[0]:.3f}" for result in results)
        print(
            f"| `{preset}` | {parameters:,} | {took:.2f} | {speed:,.0f} | {readings:.2g} "
            f"| {losses} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
