"""What several test files share: a folder to work in, a text, and a small trained run."""

import random
import shutil
import signal
from pathlib import Path

import pytest

import train
from data import Text, TextConfig, read_text
from training import on_threads

# Signals work in the processes that tests start, even if they themselves run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SMALL = ["--preset", "tiny", "--n_embd", "16", "--batch_size", "4", "--device", "cpu"]


# Samples and pictures would take most of the time of runs as short as they are here. (Those that
# are processes of their own still have them.)
USUAL_LENGTH, train.SAMPLE_LENGTH = train.SAMPLE_LENGTH, 40
USUAL_PLOTTING, train.PLOTTING = train.PLOTTING, False


@pytest.fixture
def _as_users_run(monkeypatch):
    """Samples are as long as elsewhere, and pictures are drawn."""
    monkeypatch.setattr(train, "SAMPLE_LENGTH", USUAL_LENGTH)
    monkeypatch.setattr(train, "PLOTTING", USUAL_PLOTTING)


@pytest.fixture
def _two_threads():
    """torch computes on two threads, however many cores there are."""
    with on_threads(2):
        yield


def characters(text: Text) -> str:
    """All characters of a text."""
    return "".join(text.blocks())


def read_file(path: str) -> str:
    """All characters of a text in a file."""
    return characters(read_text([path], TextConfig()))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Nothing that a test writes lands in the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def story() -> str:
    """A text of about 6,000 characters, some of them not ASCII, with rules that can be learned."""
    draw = random.Random(1)
    names, verbs = ["Ada", "Zoë", "Bo", "李雷"], ["sees", "hears", "helps"]
    lines = (f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}." for _ in range(450))
    return "\n".join(lines) + "\n"


@pytest.fixture
def book(story) -> str:
    """The path of that text."""
    Path("book.txt").write_text(story, encoding="utf-8")
    return "book.txt"


def train_in(folder: Path, story: str, words: list[str]) -> Path:
    """Train on a story as book.txt in a folder, and return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("book.txt").write_text(story, encoding="utf-8")
        assert train.main(["book.txt", *words]) == 0
    return folder


@pytest.fixture(scope="session")
def _trained_once(story, tmp_path_factory):
    words = [*SMALL, "--max_steps", "20", "--out", "out/trained"]
    return train_in(tmp_path_factory.mktemp("trained"), story, words)


@pytest.fixture
def trained(book, _trained_once) -> str:
    """The folder of a run of 20 steps on that text."""
    shutil.copytree(_trained_once / "out", "out")
    return "out/trained"
