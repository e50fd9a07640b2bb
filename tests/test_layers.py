"""The modules depend on one another in one direction only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_USE = {
    "model": {"graphs"},
    "data": set(),
    "config": set(),
    "optimizer": set(),
    "checkpoint": {"optimizer", "model", "data", "config"},
    "report": set(),
    "graphs": set(),
    "training": {"graphs", "model", "data", "config", "optimizer"},
    "run": {"training", "checkpoint", "model", "data", "config", "optimizer"},
    "measurement": {"run", "training", "checkpoint", "report", "model", "data", "config"},
    "train": {
        "run",
        "training",
        "graphs",
        "report",
        "checkpoint",
        "model",
        "data",
        "config",
        "optimizer",
    },
    "compare": {
        "measurement",
        "run",
        "training",
        "checkpoint",
        "report",
        "model",
        "data",
        "config",
    },
    "sample": {"training", "checkpoint", "model", "data", "config"},
}
# The network is torch and nothing else: no text, no files, no printing.
FOREIGN_TO_THE_MODEL = {"numpy", "pathlib", "json", "sys", "os", "tqdm", "safetensors"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def files(module: str) -> list[Path]:
    folder = ROOT / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("module", MAY_USE)
def test_arrows_point_down(module):
    used = set().union(*(imports(path) for path in files(module)))
    assert used & MAY_USE.keys() <= MAY_USE[module] | {module}


@pytest.mark.parametrize("module", MAY_USE)
def test_nothing_reads_pickles(module):
    for path in files(module):
        source = path.read_text(encoding="utf-8")
        assert "pickle" not in source
        assert "torch.load" not in source


def test_every_module_has_its_place():
    modules = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert modules | packages == MAY_USE.keys()


def test_model_is_torch_only():
    assert not imports(ROOT / "model.py") & FOREIGN_TO_THE_MODEL
