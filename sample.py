"""Write with a trained model: python sample.py out/book-small --prompt Once

Or say how well it predicts a text: python sample.py out/book-small --score other.txt
"""

import contextlib
import itertools
import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

# Read when torch is loaded, and the same as in train.py, where it is explained.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")

import torch

from checkpoint import find_run, load_model, newest_run
from config import SettingsParser, Values, build
from config.hardware import Device, choose_device, choose_precision, to_device
from config.script import bad_input_exits, harmless, run_script
from data import LONG_COPY, TextConfig, Vocabulary, count_copied, evenly_spaced, read_text
from model import GPT, SamplingConfig
from training import EVALUATED_CHARACTERS, bits_per_byte, evaluate, nats_and_bits


@dataclass(frozen=True)
class WritingConfig:
    """What to write or to score, and where."""

    prompt: Annotated[str | None, r"text to continue; \n in it is a line break"] = None
    prompt_file: Annotated[str | None, "file with the text to continue"] = None
    length: Annotated[int, "characters to write"] = 500
    num_samples: Annotated[int, "texts to write"] = 1
    stop: Annotated[str | None, "end a text as soon as it contains this"] = None
    copied_from: Annotated[
        str | None, "a text; say how much of what is written is copied from it"
    ] = None
    score: Annotated[
        str | None, "a text; say how well the model predicts it, and write nothing"
    ] = None
    encoding: Annotated[str, "that of the files named here, such as cp1252; auto: found out"] = (
        "auto"
    )
    seed: Annotated[int | None, "the same seed writes the same text; none: a new one"] = None
    unknown: Annotated[
        Literal["refuse", "skip"], "what to do with characters that the model does not know"
    ] = "refuse"
    device: Annotated[Device, "where to run the model"] = "auto"

    def __post_init__(self):
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt_file both give a prompt; give one of them")
        for name in ("length", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.stop == "":
            raise ValueError("stop is empty; it must be at least one character")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        TextConfig(self.encoding)  # it says which there are


# Texts are written side by side, so that each weight is read once for all of them: 64 with a
# context of 256 characters, fewer with a longer one, which takes more memory, and at most 256.
CHARACTERS_AT_ONCE = 2**14
TEXTS_AT_ONCE = 2**8
SHOWN_COPY = 60  # characters

SECTIONS = {"sampling": SamplingConfig, "writing": WritingConfig}


def main(argv: Sequence[str] | None = None) -> int:
    """Write as the command line says, and return the exit code."""
    with bad_input_exits("sample.py"):
        about = "Write with a trained model, or say how well it predicts a text."
        parser = SettingsParser("sample.py", "RUN", about, SECTIONS)
        parser.add_argument(
            "run",
            nargs="?",
            metavar="RUN",
            help="run folder or checkpoint file (default: the newest below out/)",
        )
        arguments, flags = parser.parse(argv)
        sampling, writing = build(SECTIONS, flags)
        device, reason = choose_device(writing.device)
        run = find_run(arguments.run) if arguments.run is not None else newest_run()
        model, vocabulary = load_model(run)
        if writing.score is not None:
            refuse_idle_flags(flags)
            text, note = read_to_score(writing, vocabulary)
            to_device(model, device)
            precision, why = choose_precision("auto", device, model.config.n_embd)
            used = f"{device} ({reason}), {str(precision).removeprefix('torch.')} ({why})"
            print(f"{run} on {used}", file=sys.stderr)
            print(score(model, vocabulary, text, precision, note))
            return 0
        prompt = read_prompt(writing, vocabulary)
        stop = read_stop(writing, vocabulary)
        source = None
        if writing.copied_from is not None:
            source = whole_text(writing.copied_from, writing.encoding)
        to_device(model, device)
        seed = writing.seed
        if seed is None:
            seed = secrets.randbelow(2**31 - writing.num_samples)
        print(f"{run} on {device} ({reason}), --seed {seed}", file=sys.stderr)
        # The seeds follow one another, so any of the texts can be had again by itself.
        seeds = range(seed, seed + writing.num_samples)
        try:
            texts = write(model, vocabulary, prompt, stop, writing.length, sampling, seeds)
            written = [text for text in texts if source is not None]
        finally:
            print()
        if source is not None:
            print(describe_copies(written, source, writing.copied_from), file=sys.stderr)
        return 0


def write(
    model: GPT,
    vocabulary: Vocabulary,
    prompt: str,
    stop: str | None,
    length: int,
    sampling: SamplingConfig,
    seeds: Sequence[int],
) -> Iterator[str]:
    """Print a text for each seed, and yield what was written after the prompt."""
    show = harmless if sys.stdout.isatty() else str
    device = model.head.weight.device
    at_once = min(TEXTS_AT_ONCE, max(1, CHARACTERS_AT_ONCE // model.config.block_size))
    for first in range(0, len(seeds), at_once):
        generators = [
            torch.Generator(device).manual_seed(s) for s in seeds[first : first + at_once]
        ]
        ids = vocabulary.encode(prompt or vocabulary.start)[None].to(device).long()
        ids = ids.expand(len(generators), -1)  # (B, T)
        stream = model.generate(ids, sampling, generators, unwritten=vocabulary.unwritten)
        with contextlib.closing(stream):
            # A column holds the next character of each text.
            columns = (vocabulary.decode(next_ids.tolist()) for next_ids in stream)
            columns = itertools.islice(columns, length)
            # The first text is shown as it is written, the others after it.
            for i, own in enumerate(itertools.tee(columns, len(generators))):
                print("\n---\n" * (first + i > 0) + show(prompt), end="", flush=True)
                text = ""
                for column in own:
                    text += column[i]
                    print(show(column[i]), end="", flush=True)
                    if stop is not None and text.endswith(stop):
                        break
                yield text


def refuse_idle_flags(flags: Values) -> None:
    """Raise ValueError for flags that only change what is written."""
    for name in [*flags["sampling"], *flags["writing"]]:
        if name not in ("score", "encoding", "unknown", "device"):
            raise ValueError(f"--score writes nothing, so leave out --{name}")


def whole_text(path: str, encoding: str) -> str:
    """Return all that a file or folder holds, read as train.py reads it."""
    return "".join(read_text([path], TextConfig(encoding)).blocks())


def read_to_score(writing: WritingConfig, vocabulary: Vocabulary) -> tuple[str, str]:
    """Return the text to score, and what is to be said of characters that the model does not know.

    Raises ValueError if there are some that are neither skipped nor stand for the unknown one, or
    if too little is known.
    """
    text, note = whole_text(writing.score, writing.encoding), ""
    known = vocabulary.known(text)
    if n_unknown := len(text) - len(known):
        what = "left out" if writing.unknown == "skip" else "taken for the unknown character"
        note = f"; {n_unknown:,} that the model does not know were {what}"
        text = readable(text, vocabulary, writing, stand_in=True)
    if len(known) < 2:
        raise ValueError(
            f"{writing.score} has too few characters that the model knows: {len(known)}"
        )
    return text, note


def score(model: GPT, vocabulary: Vocabulary, text: str, precision: torch.dtype, note: str) -> str:
    """Say how well a model predicts a text, measured as a run measures its validation part."""
    ids = evenly_spaced(vocabulary.encode(text, unknown=True), EVALUATED_CHARACTERS)
    loss = evaluate(model, ids.to(model.head.weight.device), precision)
    predicted = vocabulary.decode(ids[1:].tolist())
    # Where characters are unknown, it is another text whose bytes would be counted.
    per_byte = "" if note else f", {bits_per_byte(loss, predicted):.4f} bits per byte"
    return (
        f"{nats_and_bits(loss)}{per_byte}, the mean over {len(predicted):,} of {len(text):,} "
        f"characters{note}"
    )


def describe_copies(written: Sequence[str], source: str, name: str) -> str:
    """Say how much of what was written is copied from a source."""
    counts, passages = zip(*(count_copied(text, source) for text in written), strict=True)
    share, longest = sum(counts) / sum(map(len, written)), max(passages, key=len)
    return (
        f"copied: {share:.1%} of what was written lies in passages of {LONG_COPY} characters or "
        f"more that stand in {name}; the longest that stands there, of any length, has "
        f"{len(longest)} and begins {longest[:SHOWN_COPY]!r}"
    )


def read_prompt(writing: WritingConfig, vocabulary: Vocabulary) -> str:
    """Return the text to continue, empty if none is given."""
    prompt = unescape(writing.prompt or "")
    if writing.prompt_file is not None:
        prompt = whole_text(writing.prompt_file, writing.encoding)
    return readable(prompt, vocabulary, writing)


def readable(
    text: str, vocabulary: Vocabulary, writing: WritingConfig, stand_in: bool = False
) -> str:
    """Return a text as a model can read it, without what it does not know if that is to be skipped.

    Otherwise such characters are a ValueError, unless another can stand in for them.
    """
    if writing.unknown == "skip":
        return vocabulary.known(text)
    try:
        vocabulary.encode(text, unknown=stand_in)
    except ValueError as error:
        raise ValueError(f"{error}; --unknown skip leaves such characters out") from None
    return text


def read_stop(writing: WritingConfig, vocabulary: Vocabulary) -> str | None:
    """Return the string that ends a text, if there is one."""
    if writing.stop is None:
        return None
    stop = unescape(writing.stop)
    try:
        ids = vocabulary.encode(stop).tolist()
    except ValueError as error:
        raise ValueError(f"--stop {writing.stop!r} will never be written: {error}") from None
    if not set(ids).isdisjoint(vocabulary.unwritten):
        raise ValueError(
            f"--stop {writing.stop!r} will never be written: it has the character that stands for "
            "rare ones"
        )
    return stop


def unescape(text: str) -> str:
    r"""Turn \n, \t and \\, as typed in a shell, into a line break, a tab and a backslash."""
    meanings = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda match: meanings[match[0]], text)


if __name__ == "__main__":
    run_script(main)
