"""Pictures of losses, drawn by matplotlib where it is installed."""

import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from report.table import Row

PLOTTING = importlib.util.find_spec("matplotlib") is not None

# Each is readable on white, and distinct for people who see fewer colours; so are the markers.
COLORS = ["#0b62a4", "#a84300", "#1b7a4b", "#8a3fa0", "#a0332e", "#5c6670"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # one more than colors: pairs repeat late
INK, FAINT = "#1f2328", "#667080"

STYLE = {
    "svg.fonttype": "none",  # letters stay letters, in the font of the page
    "svg.hashsalt": "chargpt",  # the same picture has the same bytes
    "font.family": "sans-serif",
    "font.size": 10.5,
    "lines.markersize": 4,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT),
}


def curve(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a picture (SVG) of a run's losses, step by step, from the lines of its log."""

    def draw(axes: Any) -> None:
        after = [line for line in lines if line["step"]]
        for i, name in enumerate(("validation", "training")):
            known = [line for line in after if line[f"{name}_loss"] is not None]
            steps, losses = ([line[key] for line in known] for key in ("step", f"{name}_loss"))
            axes.plot(steps, losses, color=COLORS[i], marker=MARKERS[i], label=name)
        axes.set(xlabel="step", ylabel="loss, nats per character")
        axes.legend(loc="upper right")

    return _file(draw)


def comparison(rows: Sequence[Row], baselines: Mapping[str, float]) -> bytes:
    """Return a picture (SVG) of the validation losses of several models as the seconds go by."""
    return _file(_losses_by("seconds", rows, baselines))


def loss_against(key: str, rows: Sequence[Row], baselines: Mapping[str, float]) -> str:
    """Return a picture of validation losses by "seconds" or by "characters" seen, for a page."""
    return _element(_losses_by(key, rows, baselines))


def loss_against_parameters(rows: Sequence[Row]) -> str:
    """Return a picture of what each size has reached, for a page."""

    def draw(axes: Any) -> None:
        ordered = sorted(rows, key=lambda row: row.parameters)
        sizes, losses = [row.parameters for row in ordered], [row.loss for row in ordered]
        axes.plot(sizes, losses, color=FAINT, linewidth=1, zorder=1)
        for i, row in enumerate(rows):
            axes.errorbar(
                row.parameters,
                row.loss,
                2 * row.error if math.isfinite(row.error) else 0,
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=6,
                capsize=3,
                label=_plain(row.name),
            )
        _logarithmic(axes)
        axes.margins(x=0.15)
        axes.set(xlabel="parameters", ylabel="validation loss, nats per character")
        axes.legend(loc="best")

    return _element(draw)


def _losses_by(
    key: str, rows: Sequence[Row], baselines: Mapping[str, float]
) -> Callable[[Any], None]:
    labels = {"seconds": "seconds, evaluations included", "characters": "characters seen"}

    def draw(axes: Any) -> None:
        for i, row in enumerate(rows):
            for seed, run in enumerate(row.runs):
                # An untrained model has seen nothing, for which logarithms have no place.
                lines = [line for line in run if line["step"]]
                axes.plot(
                    [line[key] for line in lines],
                    [line["validation_loss"] for line in lines],
                    color=COLORS[i % len(COLORS)],
                    marker=MARKERS[i % len(MARKERS)],
                    label=None if seed else _plain(row.name),
                )
        _logarithmic(axes)
        low, high = axes.get_ylim()
        for name in ("trigram", "xz"):
            nats = baselines[name] * math.log(2)
            if low < nats < high:
                axes.axhline(nats, color=FAINT, linewidth=1, linestyle="--", zorder=0)
                axes.annotate(
                    name,
                    (0.01, nats),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    xytext=(0, 2),
                )
        axes.set(xlabel=labels[key], ylabel="validation loss, nats per character")
        axes.legend(loc="upper right")

    return draw


def _logarithmic(axes: Any) -> None:
    """Give a picture a logarithmic axis to the right, with numbers such as 20, 500k and 1M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _plain(name: str) -> str:
    """Return a name that is not taken for a formula, and that a legend does not leave out."""
    readable = name.encode(errors="replace").decode().replace("$", r"\$")
    return "\u200b" + readable if readable.startswith("_") else readable


def _file(draw: Callable[[Any], None]) -> bytes:
    """Return an SVG file, on white, with what is drawn into axes."""
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + _element(draw, transparent=False).encode()


def _element(draw: Callable[[Any], None], transparent: bool = True) -> str:
    """Return an SVG element, 4.8 x 3.6 inches, with what is drawn into axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # It warns of letters that it has no shapes of; the browser has.
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(4.8, 3.6))
        # To have the margins found out takes as long as all the rest.
        axes = figure.add_axes((0.145, 0.135, 0.84, 0.845))
        axes.grid(color=FAINT, alpha=0.2, linewidth=0.5)
        draw(axes)
        written = io.StringIO()
        # Its metadata would say when and with what it was made.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=transparent, metadata=nothing)
    picture = written.getvalue()
    return picture[picture.index("<svg") :]
