"""A comparison as one page that needs nothing but a browser."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from report.plots import COLORS, FAINT, INK, PLOTTING, loss_against, loss_against_parameters
from report.table import COLUMNS, WORDS, Row, baseline_cells, cells

# From here on, all bits of surprise have the same colour.
MOST_BITS = 7
# Where the slider for the samples stops: from 0 to all of the run.
SAMPLE_STOPS = 10


def as_page(
    title: str,
    rows: Sequence[Row],
    baselines: Mapping[str, float],
    passage: str,
    about_errors: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """Return the page (HTML) of a comparison.

    `passage` is what every row's `surprise` is about, `about_errors` says in sentences what the
    numbers hold, and `facts` how to get them again.
    """
    measured = [row for row in rows if row.failure is None]
    samples = {row.name: _samples(row) for row in measured}
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        summary=escape(summary(rows)),
        table=_table(rows, baselines),
        about_errors="".join(f"<li>{escape(sentence)}</li>" for sentence in about_errors),
        pictures=_pictures(measured, baselines),
        samples="".join(
            f'<article><h3>{escape(name)}</h3><pre data-sample="{i}" tabindex="0" role="region" '
            f'aria-label="Sample of {escape(name)}">{escape(texts[-1])}</pre></article>'
            for i, (name, texts) in enumerate(samples.items())
        ),
        stops=SAMPLE_STOPS,
        passages="".join(
            f"<article><h3>{escape(row.name)}: {sum(row.surprise) / len(row.surprise):.2f} bits "
            f'per character here</h3><p class="passage">{_colored(passage, row.surprise)}</p>'
            f'<p class="likelihood" data-likelihood="{i}">&nbsp;</p></article>'
            for i, row in enumerate(measured)
        ),
        legend="".join(
            f'<span class="s{bits}">{bits}{"+" if bits == MOST_BITS else ""}</span>'
            for bits in range(MOST_BITS + 1)
        ),
        facts="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items()
        ),
        # In a script, only the beginning of a tag could end it.
        data=json.dumps(
            {
                "samples": list(samples.values()),
                "passage": list(passage),
                "surprises": [[round(bits, 2) for bits in row.surprise] for row in measured],
            },
            ensure_ascii=False,
        ).replace("<", "\\u003c"),
    )


def summary(rows: Sequence[Row]) -> str:
    """Say in a sentence or two which preset is the best and which may be as good."""
    (best,) = (row for row in rows if row.best)
    said = f"{best.name} knows the validation part best: {best.loss:.3f} nats per character."
    like = [row.name for row in rows if row.verdict == "not distinguishable"]
    if like:
        verb = "is" if len(like) == 1 else "are"
        said += f" {' and '.join(like)} {verb} not distinguishable from it."
    if failed := [row.name for row in rows if row.failure is not None]:
        said += f" {' and '.join(failed)} failed."
    return said


def _samples(row: Row) -> list[str]:
    """Return what the first seed wrote at each stop of the slider: the newest text by then."""
    points = row.runs[0]
    first = points[0]["sample"] if points else ""
    return [
        next((x["sample"] for x in reversed(points) if x["share"] <= stop / SAMPLE_STOPS), first)
        for stop in range(SAMPLE_STOPS + 1)
    ]


def _table(rows: Sequence[Row], baselines: Mapping[str, float]) -> str:
    head = "".join(f'<th scope="col"{_kind(name)}>{escape(name)}</th>' for name in COLUMNS)
    body = ""
    for row in rows:
        kind = {"best": "best", "not distinguishable": "like"}.get(row.verdict, "other")
        if row.failure is not None:
            why = f"failed: {escape(row.failure)}"
            columns = f'<td colspan="{len(COLUMNS) - 1}" class="word failure">{why}</td>'
            body += f'<tr><th scope="row">{escape(row.name)}</th>{columns}</tr>'
        else:
            body += _line(cells(row), kind)
    for name, bits in baselines.items():
        body += _line(baseline_cells(name, bits), "baseline")
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _line(contents: Sequence[str], kind: str) -> str:
    """Return a row of the table."""
    name, *rest = map(escape, contents)
    columns = "".join(
        f"<td{_kind(column)}>{cell}</td>" for column, cell in zip(COLUMNS[1:], rest, strict=True)
    )
    return f'<tr class="{kind}"><th scope="row">{name}</th>{columns}</tr>'


def _kind(column: str) -> str:
    return ' class="word"' if column in WORDS else ""


def _pictures(rows: Sequence[Row], baselines: Mapping[str, float]) -> str:
    if not PLOTTING:
        return "<p>Pictures of the losses need one more package: pip install matplotlib</p>"
    try:
        pictures = {
            "Loss against time": loss_against("seconds", rows, baselines),
            "Loss against characters seen": loss_against("characters", rows, baselines),
            "Loss against parameters, with two standard errors": loss_against_parameters(rows),
        }
    except Exception as error:
        # The package may be broken in any way, and the rest of the page does not need it.
        return f"<p>The losses could not be drawn: {escape(repr(error))}</p>"
    return "".join(
        f"<figure>{_themed(picture, name, i)}<figcaption>{name}</figcaption></figure>"
        for i, (name, picture) in enumerate(pictures.items())
    )


def _themed(picture: str, name: str, number: int) -> str:
    """Let the page say a picture's colors, and keep its names apart from those of the others."""
    for i, color in enumerate(COLORS):
        picture = picture.replace(color, f"var(--series-{i})")
    picture = picture.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    for before in ('id="', "url(#", 'href="#'):
        picture = picture.replace(before, f"{before}p{number}-")
    return picture.replace(
        "<svg ", f'<svg role="img" aria-label="{name}; the numbers are in the table" ', 1
    )


def _colored(passage: str, surprise: Sequence[float]) -> str:
    """Return a passage with each character on a color that shows its surprise."""
    return "".join(
        f'<span class="s{min(MOST_BITS, int(bits))}">{_visible(character)}</span>'
        for character, bits in zip(passage, surprise, strict=True)
    )


def _visible(character: str) -> str:
    return "↵\n" if character == "\n" else escape(character)
