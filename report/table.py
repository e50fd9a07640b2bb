"""One row for each model that was compared, as a table for people and as CSV for programs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# One bit in nats.
BIT = math.log(2)


@dataclass
class Row:
    """What came of one preset, as the mean over its seeds where there are several."""

    name: str
    # Why there is nothing else to say about it.
    failure: str | None = None
    seeds: int = 0
    # Those that failed are not among them.
    failed_seeds: int = 0
    parameters: int = 0
    # Without those of embeddings and head.
    in_blocks: int = 0
    context: int = 0
    # How many characters it was trained on, how often that is the text, and how fast.
    characters: float = 0.0
    readings: float = 0.0
    characters_per_second: float = 0.0
    # Nats per character on the validation part, and the standard error of that.
    loss: float = math.nan
    error: float = math.nan
    # How much less the loss is on as much of the training part.
    gap: float = 0.0
    best: bool = False
    # How much more the loss is than the best row's, on the same characters, and half of the
    # interval that holds this difference in 95 of 100 cases.
    behind: float = 0.0
    margin: float = 0.0
    written_per_second: float = 0.0
    # For each seed, the lines of its log, with the share of the run and the characters till then.
    runs: list[list[dict[str, Any]]] = field(default_factory=list)
    # The bits that each character of a passage costs.
    surprise: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Whether it is the best, or as good as that for all we know."""
        if self.failure is not None:
            return "failed"
        if self.best:
            return "best"
        return "" if self.behind > self.margin else "not distinguishable"


# What people want to know first stands first, where it is on a phone, too.
COLUMNS = [
    "preset",
    "nats ± error",
    "bits",
    "behind the best",
    "verdict",
    "gap",
    "parameters",
    "in blocks",
    "context",
    "characters",
    "readings",
    "trained/s",
    "written/s",
]
WORDS = ("preset", "verdict")


def cells(row: Row) -> list[str]:
    """Return what stands in the columns of a row that has not failed."""
    name = row.name if row.seeds == 1 else f"{row.name}, {row.seeds} seeds"
    if row.failed_seeds:
        name = f"{row.name}, {row.seeds} of {row.seeds + row.failed_seeds} seeds"
    return [
        name,
        f"{row.loss:.3f} ± {_known(row.error)}",
        f"{row.loss / BIT:.3f}",
        "" if row.best else f"{row.behind:.3f} ± {_known(row.margin)}",
        row.verdict,
        f"{row.gap:+.3f}",
        f"{row.parameters:,}",
        f"{row.in_blocks:,}",
        f"{row.context:,}",
        f"{row.characters:,.0f}",
        f"{row.readings:.2g}" if row.readings < 100 else f"{row.readings:,.0f}",
        "" if math.isnan(row.characters_per_second) else f"{row.characters_per_second:,.0f}",
        f"{row.written_per_second:,.0f}",
    ]


def _known(error: float) -> str:
    return f"{error:.3f}" if math.isfinite(error) else "?"


def baseline_cells(name: str, bits: float) -> list[str]:
    """Return what stands in the columns for a model that only counts."""
    known = {"preset": name, "nats ± error": f"{bits * BIT:.3f}", "bits": f"{bits:.3f}"}
    return [known.get(column, "") for column in COLUMNS]


def as_table(rows: Sequence[Row], baselines: Mapping[str, float]) -> str:
    """Return the table for a terminal or a README; baselines are bits by name."""
    lines = [COLUMNS]
    lines += [cells(row) for row in rows if row.failure is None]
    lines += [baseline_cells(name, bits) for name, bits in baselines.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            cell.ljust(width) if name in WORDS else cell.rjust(width)
            for name, cell, width in zip(COLUMNS, line, widths, strict=True)
        ]
        for line in lines
    ]
    rule = [
        "-" * width if name in WORDS else "-" * (width - 1) + ":"
        for name, width in zip(COLUMNS, widths, strict=True)
    ]
    written = [f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])]
    # Why a preset failed may be long, and fits into no column.
    written += [f"| {row.name} | failed: {row.failure} |" for row in rows if row.failure]
    return "\n".join(written)


def as_csv(rows: Sequence[Row], baselines: Mapping[str, float]) -> str:
    """Return the table for programs: losses in nats, with all their digits."""
    written = io.StringIO()
    names = ["preset", "seeds", "parameters", "parameters_in_blocks", "context", "characters"]
    names += ["readings", "characters_per_second", "loss", "error", "bits_per_character"]
    names += ["gap", "behind_best", "behind_best_margin", "written_per_second"]
    names += ["verdict", "failure"]
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        if row.failure is not None:
            writer.writerow([row.name, *[""] * (len(names) - 3), row.verdict, row.failure])
            continue
        numbers = [row.seeds, row.parameters, row.in_blocks, row.context, round(row.characters)]
        numbers += [row.readings, row.characters_per_second, row.loss, row.error, row.loss / BIT]
        numbers += [row.gap, row.behind, row.margin, row.written_per_second]
        writer.writerow([row.name, *numbers, row.verdict, ""])
    for name, bits in baselines.items():
        known = {"preset": name, "loss": bits * BIT, "bits_per_character": bits}
        writer.writerow([known.get(column, "") for column in names])
    return written.getvalue()
