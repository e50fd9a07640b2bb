"""Errors hold what they say they hold, and differences are judged by them."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from checkpoint import LOG, read_log
from data import TextConfig, Vocabulary, read_text
from measurement import Measured, Parts, measure, standard_error, student, summarize, surprise
from model import GPT, GPTConfig
from report import Row


@pytest.fixture(autouse=True)
def _same_noise_each_time():
    torch.manual_seed(1)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_standard_error_of_independent_values():
    errors = [standard_error(3 * noise(6400)) for _ in range(100)]
    # The mean of 100 estimates, each of which varies by 1 / sqrt(2 * 63), varies by 1 %.
    assert sum(errors) / 100 == pytest.approx(3 / math.sqrt(6400), rel=0.04)


def test_standard_error_knows_that_neighbours_are_alike():
    # In stretches of five characters all cost the same, so a text is worth a fifth of its length.
    errors = [standard_error(noise(2000).repeat_interleave(5)) for _ in range(100)]
    assert sum(errors) / 100 == pytest.approx(1 / math.sqrt(2000), rel=0.05)
    assert standard_error(noise(10_000)) == pytest.approx(0.01, rel=0.4)


def test_of_too_few_values_nothing_is_known():
    assert standard_error(noise(99)) == math.inf
    assert math.isfinite(standard_error(noise(100)))


@pytest.mark.parametrize("freedom", [*range(1, 31), 63, 1000])
def test_students_interval_holds_95_of_100(freedom):
    x = torch.linspace(0, student(freedom), 100_001, dtype=torch.float64)
    of_x = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    log_factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = of_x * math.exp(log_factor) / math.sqrt(freedom * math.pi)
    assert 2 * torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=0.0005)


def test_nothing_is_known_without_a_degree_of_freedom():
    assert student(0) == math.inf


def runs(name: str, loss: float, seeds: int, spread: float) -> list[Measured]:
    """Make up runs whose losses vary over the text, and over seeds, by known amounts."""
    means = loss + spread * noise(seeds)
    return [Measured(Row(name, seeds=1, runs=[[]]), mean + noise(6400)) for mean in means]


def test_presets_that_differ_in_seeds_only_are_not_distinguished():
    wrong = 0
    for _ in range(200):
        rows = summarize(runs("a", 1.5, 3, 0.05) + runs("b", 1.5, 3, 0.05))
        wrong += any(row.verdict == "" for row in rows)
    # 10 are expected; more than 18 or less than 3 would be chance once in a hundred times.
    assert 3 <= wrong <= 18


def test_presets_that_differ_are_distinguished():
    for _ in range(50):
        rows = summarize(runs("a", 1.5, 3, 0.02) + runs("b", 1.7, 3, 0.02))
        assert [row.verdict for row in rows] == ["best", ""]
        assert rows[1].behind == pytest.approx(0.2, abs=0.08)
        assert rows[0].loss == pytest.approx(1.5, abs=0.06)


def test_differences_are_judged_on_the_same_characters():
    # The text varies a hundred times as much as the models differ, but it is the same text.
    text = noise(6400)
    made = {"a": text, "b": text + 0.01 + 0.001 * noise(6400)}
    rows = summarize([Measured(Row(n, runs=[[]]), x) for n, x in made.items()])
    assert [row.verdict for row in rows] == ["best", ""]
    assert rows[1].behind < rows[1].error


def test_with_too_short_a_text_nothing_is_distinguished():
    made = {"a": torch.zeros(80), "b": torch.ones(80)}
    rows = summarize([Measured(Row(n, runs=[[]]), x) for n, x in made.items()])
    assert [row.verdict for row in rows] == ["best", "not distinguishable"]


def test_surprise_is_that_of_all_the_context_there_is():
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=4, n_layer=1, n_head=2, n_embd=8), vocab_size=5)
    ids = torch.tensor([0, 3, 1, 4, 2, 2, 0, 1], dtype=torch.uint8)
    bits = surprise(model, ids, slice(2, 7))
    for place, cost in zip(range(2, 7), bits, strict=True):
        context = ids[max(0, place - 4) : place].long()
        logits = model(context[None])[0, -1].detach()
        assert cost == pytest.approx(
            -math.log2(F.softmax(logits, dim=0)[int(ids[place])]), rel=1e-5
        )


@pytest.mark.parametrize(("length", "longest", "passage"), [(50, 8, (1, 50)), (600, 64, (64, 464))])
def test_passage(length, longest, passage):
    ids = torch.zeros(length, dtype=torch.uint8)
    where = Parts(ids, ids, longest).passage
    assert (where.start, where.stop) == passage


@pytest.fixture
def parts(trained) -> Parts:
    text = read_text(["book.txt"], TextConfig())
    return Parts.of(text, Vocabulary.of_counts(text.counts, 1), torch.device("cpu"), 8)


def test_what_is_measured_is_what_the_run_has_found(trained, parts, story):
    run = measure("trained", Path(trained), parts, torch.device("cpu"))
    log = read_log(Path(trained))
    assert run.losses.mean().item() == min(line["validation_loss"] for line in log)
    assert len(run.losses) == math.ceil(len(story) / 10) - 1
    assert run.row.characters == 20 * 4 * 8
    assert run.row.context == 8
    assert run.row.characters_per_second == 20 * 4 * 8 / log[-1]["seconds"]
    (lines,) = run.row.runs
    assert [line["validation_loss"] for line in lines] == [line["validation_loss"] for line in log]
    assert (lines[0]["share"], lines[-1]["share"]) == (0, 1)
    assert run.row.written_per_second > 0
    assert len(run.row.surprise) == 400


def test_of_a_run_without_a_log_no_speed_is_known(trained, parts):
    Path(trained, LOG).unlink()
    run = measure("trained", Path(trained), parts, torch.device("cpu"))
    assert math.isnan(run.row.characters_per_second)
    assert run.row.runs == [[]]
