"""What is known of finished runs, how sure that is, and which differences are more than chance.

Shapes: N characters of the validation part, K seeds.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import BEST, LAST, Checkpoint, load_checkpoint, read_log
from config import build
from config.hardware import choose_precision, to_device
from data import Text, Vocabulary, evenly_spaced
from model import GPT, SamplingConfig
from report import Row
from run import TrainConfig
from training import EVALUATED_CHARACTERS, character_losses, evaluate

WRITTEN = 300  # characters, to see how fast a model writes
PASSAGE = 400  # characters whose surprise is shown
# Stretches that a validation part is cut into to see how the loss varies, and the shortest.
STRETCHES, SHORTEST = 64, 50
# The 97.5th percentile of Student's t with 1, 2, 3, ... degrees of freedom.
STUDENT = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14]


@dataclass(frozen=True)
class Parts:
    """A text as it is measured on, and how far the models look back that are compared."""

    training_ids: Tensor
    # Of a long text, the same stretches for all.
    validation_ids: Tensor
    longest: int

    @classmethod
    def of(cls, text: Text, vocabulary: Vocabulary, device: torch.device, longest: int) -> "Parts":
        """Read the parts of a text."""
        ids = text.ids(vocabulary, copied=device.type != "cpu").to(device)
        validation_ids = evenly_spaced(ids[text.n_training :], EVALUATED_CHARACTERS)
        return cls(ids[: text.n_training], validation_ids, longest)

    @property
    def passage(self) -> slice:
        """The characters whose surprise is shown; if there are enough, all have full context."""
        start = max(1, min(self.longest, len(self.validation_ids) - PASSAGE))
        return slice(start, min(start + PASSAGE, len(self.validation_ids)))


@dataclass(frozen=True)
class Measured:
    """What is known of one finished run."""

    # What the row of its preset says if there is no other seed.
    row: Row
    # The loss of each character of the validation part but the first, (N,) in nats.
    losses: Tensor


def measure(name: str, folder: Path, parts: Parts, device: torch.device) -> Measured:
    """Measure the best model of a run on a device."""
    last, best = load_last(folder), load_checkpoint(folder / BEST)
    model = best.model
    to_device(model, device)
    (config,) = build({"train": TrainConfig}, {"train": last.settings["train"]})
    precision, _ = choose_precision(config.dtype, device, model.config.n_embd)
    losses = character_losses(model, parts.validation_ids, precision).cpu().double()
    batch = config.batch_size * model.config.block_size
    steps, log = last.progress.step, read_log(folder)
    # Between evaluations, nobody has looked at the clock.
    known = log[-1] if log else {"step": 0, "seconds": 0}
    speed = known["step"] * batch / known["seconds"] if known["step"] else math.nan
    total, in_blocks = model.count_parameters()
    row = Row(
        name,
        seeds=1,
        parameters=total,
        in_blocks=in_blocks,
        context=model.config.block_size,
        characters=steps * batch,
        readings=steps * batch / len(parts.training_ids),
        characters_per_second=speed,
        gap=losses.mean().item() - evaluate(model, parts.training_ids, precision),
        written_per_second=writing_speed(model, best.vocabulary),
        runs=[
            [
                line | {"share": line["step"] / max(steps, 1), "characters": line["step"] * batch}
                for line in log
            ]
        ],
        surprise=surprise(model, parts.validation_ids, parts.passage),
    )
    return Measured(row, losses)


def load_last(folder: Path) -> Checkpoint:
    """Return the newest checkpoint of a run; a folder that was shared may have its best only."""
    return load_checkpoint(folder / (LAST if (folder / LAST).exists() else BEST))


def writing_speed(model: GPT, vocabulary: Vocabulary) -> float:
    """Return how many characters a second a model writes, one text at a time."""
    prompt = vocabulary.encode(vocabulary.start)[None].long().to(model.head.weight.device)
    stream = model.generate(prompt, SamplingConfig(), unwritten=vocabulary.unwritten)
    with contextlib.closing(stream):
        next(stream)
        began = time.perf_counter()
        for next_ids in itertools.islice(stream, WRITTEN):
            next_ids.tolist()
        return WRITTEN / (time.perf_counter() - began)


@torch.no_grad()
def surprise(model: GPT, ids: Tensor, places: slice) -> list[float]:
    """Return how many bits each of some characters costs, read with all the context there is."""
    model.eval()
    bits = []
    for place in range(places.start, places.stop):
        context = ids[max(0, place - model.config.block_size) : place].long()
        nats = F.cross_entropy(model(context[None])[0, -1], ids[place].long())
        bits.append(nats.item() / math.log(2))
    return bits


def summarize(measured: Sequence[Measured]) -> list[Row]:
    """Return a row for each preset, the mean over its seeds, and how it compares to the best.

    Two presets are compared on the same characters, which each of them reads in its own windows.
    A difference has two kinds of chance: what the validation part happens to be, known from its
    stretches, and what the seed happens to be, known from the spread over seeds, which is taken
    to be the same for all presets.
    """
    names = list(dict.fromkeys(run.row.name for run in measured))
    runs = {name: [run for run in measured if run.row.name == name] for name in names}
    losses = {name: torch.stack([run.losses for run in runs[name]]) for name in names}  # (K, N)
    spread, freedom = seed_spread(list(losses.values()))
    seed_student = student(freedom) if freedom else 0.0
    means = {name: of.mean(dim=0) for name, of in losses.items()}  # (N,)
    best = min(names, key=lambda name: means[name].mean().item())
    rows = []
    for name in names:
        difference, K = means[name] - means[best], len(runs[name])
        from_text = student(count_stretches(len(difference)) - 1) * standard_error(difference)
        from_seeds = seed_student * spread * math.sqrt(1 / K + 1 / len(runs[best]))
        own_rows = [run.row for run in runs[name]]
        averaged = ("characters", "readings", "characters_per_second", "gap", "written_per_second")
        rows.append(
            replace(
                own_rows[0],
                seeds=K,
                loss=means[name].mean().item(),
                error=math.hypot(standard_error(means[name]), spread / math.sqrt(K)),
                best=name == best,
                behind=difference.mean().item(),
                margin=math.hypot(from_text, from_seeds),
                runs=[row.runs[0] for row in own_rows],
                **{key: statistics.mean(getattr(row, key) for row in own_rows) for key in averaged},
            )
        )
    return rows


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values, (N,), that depend on their neighbours.

    It comes from the means of equal stretches. Without the -1 in their standard deviation, it would
    be what a bootstrap that draws whole stretches tends to ("The jackknife and the bootstrap for
    general stationary observations", Künsch, 1989).
    Values that are too few for two stretches say nothing of it: then it is infinite.
    """
    n = count_stretches(len(values))
    if n < 2:
        return math.inf
    means = values[: len(values) // n * n].view(n, -1).mean(dim=1)
    return means.std().item() / math.sqrt(n)


def count_stretches(length: int) -> int:
    """Return how many stretches a validation part of some length is cut into."""
    return min(STRETCHES, length // SHORTEST)


def seed_spread(losses: Sequence[Tensor]) -> tuple[float, int]:
    """Return the standard deviation over seeds of losses, (K, N) each, and its degrees of freedom.

    Without several seeds of anything, nothing is known of it, and both are 0.
    """
    means = [of.mean(dim=1) for of in losses]
    freedom = sum(len(of) - 1 for of in means)
    if freedom == 0:
        return 0.0, 0
    squares = sum(((of - of.mean()) ** 2).sum().item() for of in means)
    return math.sqrt(squares / freedom), freedom


def student(freedom: int) -> float:
    """Return how many standard errors hold 95 of 100 cases."""
    if freedom < 1:
        return math.inf
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.5 / freedom


def explain(rows: Sequence[Row], parts: Parts) -> list[str]:
    """Say in sentences what the numbers of a comparison do and do not hold."""
    n, seeds = len(parts.validation_ids) - 1, max(row.seeds for row in rows)
    n_training = len(evenly_spaced(parts.training_ids, EVALUATED_CHARACTERS)) - 1
    stretches = count_stretches(n)
    error = f"one standard error, from {stretches} stretches of the validation part"
    if stretches < 2:
        error = "unknown, because the validation part is too short to tell"
    elif seeds > 1:
        error += " and the spread over seeds"
    said = [
        "trained/s and written/s: characters in a second of training, evaluations included, and "
        "of writing a single text.",
        f"nats and bits: the loss per character on {n:,} characters of the validation part; gap: "
        f"how much more that is than on {n_training:,} of the training part.",
        f"±: {error}.",
        "behind the best: the difference on the same characters, ± half of its 95 % interval; a "
        "preset that is no more behind than that is not distinguishable from the best. Each "
        "interval is about one pair: of many that are equally good, one will more easily fall out.",
    ]
    if seeds == 1:
        said.append(
            "With one seed, none of this holds how other seeds would have come out; --seeds 3 adds "
            "that."
        )
    return said
