"""Defaults, presets and flags become settings, or one sentence."""

import itertools
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from config import PRESETS, SettingsParser, build, load_preset
from config.hardware import choose_device, choose_precision, logits_of, refuse_other_logits
from model import GPT, GPTConfig

SECTIONS = train.SECTIONS


def parse(*words):
    parser = SettingsParser("test", "TEXT", "A test.", SECTIONS)
    parser.add_argument("texts", nargs="*")
    return parser.parse(words)


def test_flags_win_over_preset_and_preset_over_defaults():
    preset = {"model": {"n_layer": 7, "n_head": 1}}
    _, flags = parse("--n_layer", "9", "--learning_rate=1e-3")
    model, optimizer, *_ = build(SECTIONS, preset, flags)
    assert (model.n_layer, model.n_head, model.n_embd) == (9, 1, GPTConfig.n_embd)
    assert optimizer.learning_rate == 1e-3


def test_flags_may_have_dashes_and_stand_between_texts():
    arguments, flags = parse("a.txt", "--n-layer=3", "b-c.txt", "--batch-size", "2", "d")
    assert arguments.texts == ["a.txt", "b-c.txt", "d"]
    assert flags["model"] == {"n_layer": 3}
    assert flags["optimizer"] == flags["text"] == {}
    assert flags["train"] == {"batch_size": 2}


def test_only_words_that_begin_with_two_dashes_are_flags():
    arguments, flags = parse("seed", "--glob", "n-layer", "n_layer=3")
    assert arguments.texts == ["seed", "n_layer=3"]
    assert flags["text"] == {"glob": "n-layer"}


def test_one_word_names_one_setting():
    names = [name for section in SECTIONS.values() for name in asdict(section())]
    assert len(names) == len(set(names))


def test_every_setting_is_explained_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for section in SECTIONS.values():
        for name, default in asdict(section()).items():
            assert f"--{name} " in printed
            assert f"(default: {'none' if default is None else default})" in printed


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_only_what_differs_from_the_defaults(name):
    preset = load_preset(name, SECTIONS)
    for section, values in preset.items():
        defaults = asdict(SECTIONS[section]())
        assert {key for key, value in values.items() if value == defaults[key]} == set()


def test_outer_presets_are_the_published_ones():
    published = {
        "tiny": (3, 4, 32, 8, 32, 1e-2, 437_764),
        "base": (6, 6, 384, 256, 64, 3e-4, 15_466_756),
    }
    for name, expected in published.items():
        model, optimizer, _, training = build(SECTIONS, load_preset(name, SECTIONS))
        with torch.device("meta"):
            parameters, _ = GPT(model, 6148).count_parameters()
        shape = (model.n_layer, model.n_head, model.n_embd, model.block_size)
        rest = (training.batch_size, optimizer.learning_rate, parameters)
        assert shape + rest == expected


def test_presets_grow_in_about_equal_steps():
    sizes = []
    for name in PRESETS:
        config, *_ = build(SECTIONS, load_preset(name, SECTIONS))
        with torch.device("meta"):
            sizes.append(GPT(config, 6148).count_parameters()[0])
    steps = [larger / smaller for smaller, larger in itertools.pairwise(sizes)]
    even = (sizes[-1] / sizes[0]) ** (1 / len(steps))
    assert all(even / 1.3 < step < even * 1.3 for step in steps)


def test_preset_may_be_a_file():
    Path("mine.toml").write_text("[model]\nn_embd = 8\n[train]\nminutes = 2\n")
    model, _, _, training = build(SECTIONS, load_preset("mine.toml", SECTIONS))
    assert (model.n_embd, training.minutes) == (8, 2.0)
    assert type(training.minutes) is float


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[modle]\nn_layer = 4", r"no section \[modle\] \(did you mean model\?\)"),
        ("n_layer = 4", r"the key 'n_layer' belongs below \[model\]"),
        ("model = 4", r"\[model\] must be a section of keys, not 4"),
        ("[model]\nn_layers = 4", r"\[model\] has no key 'n_layers' \(did you mean n_layer\?\)"),
        ("[model]\nn_layer = 4.5", r"n_layer is 4.5; it must be a whole number"),
        ("[model]\nn_layer = true", r"n_layer is True; it must be a whole number"),
        ("[model]\ndropout = nan", r"dropout is nan; it must be a finite number"),
        ("[model]\nn_layer = 0", r"n_layer is 0; it must be at least 1"),
        ("[train]\ndevice = 'gpu'", r"device is 'gpu'.*it must be auto or cuda or mps or cpu"),
        ("[model", "is not a TOML file"),
    ],
)
def test_wrong_preset_is_named_with_what_is_wrong(toml, message):
    Path("wrong.toml").write_text(toml)
    with pytest.raises(ValueError, match=rf"wrong\.toml.*{message}"):
        load_preset("wrong.toml", SECTIONS)


def test_device_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no cuda device here"):
            choose_device("cuda")
    assert choose_device("cpu")[0] == torch.device("cpu")


def test_precision_is_what_was_asked_for_or_fits_the_width():
    cpu = torch.device("cpu")
    assert choose_precision("bfloat16", cpu, 32)[0] == torch.bfloat16
    assert choose_precision("float32", cpu, 384)[0] == torch.float32
    assert choose_precision("auto", cpu, 32)[0] == torch.float32


def test_precision_follows_what_the_library_that_multiplies_may_use():
    ask = (
        "import torch; from config.hardware import choose_precision; "
        "print(*choose_precision('auto', torch.device('cpu'), 384))"
    )
    told = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    project = Path(train.__file__).parent
    answer = subprocess.check_output(
        [sys.executable, "-c", ask], env=told, cwd=project, encoding="utf-8"
    )
    assert answer == "torch.float32 no fast bfloat16 here\n"


def test_logits_that_tell_devices_apart_are_made_with_the_cache_and_without():
    model, ids = GPT(GPTConfig(8, 2, 2, 8), 5), torch.arange(8)[None] % 5
    logits = logits_of(model, ids)  # (1, 16, 5)
    torch.testing.assert_close(logits[:, 8:], logits[:, :8])
    assert torch.equal(logits[:, :8], model(ids))


def test_device_that_computes_something_else_is_refused():
    torch.manual_seed(1)
    expected, device = torch.randn(1, 8, 5), torch.device("mps")
    refuse_other_logits(expected * (1 + 1e-5), expected, device)
    for wrong in (expected * 1.01, expected.roll(1, 1), torch.full_like(expected, torch.nan)):
        with pytest.raises(ValueError, match="on mps the model gives other numbers than on the C"):
            refuse_other_logits(wrong, expected, device)
