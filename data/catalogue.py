"""Texts of the field that are known by name, and how they are fetched."""

import contextlib
import hashlib
import http.client
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

TEXTS = Path("out/texts")
# Where each text lies, in a zip file or as it is, and the SHA-256 of what lies there.
CATALOGUE = {
    # Tiny Shakespeare (Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks",
    # 2015): 40,000 lines of plays.
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # The first 100 million bytes of Wikipedia in English of March 2006, as XML, and their letters
    # alone, without capitals (Mahoney, "About the Test Data", 2006).
    "enwik8": (
        "http://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    "text8": (
        "http://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    ),
}
PATIENCE = 20  # seconds without an answer


def fetch(name: str) -> Path:
    """Return the file of a text in the catalogue, which is fetched if it is not there yet.

    Raises ConnectionError if it cannot be had, and ValueError if it is not what it should be.
    """
    address, sha256 = CATALOGUE[name]
    path = TEXTS / f"{name}.txt"
    if path.exists():
        return path
    with in_place_of(path) as temporary:
        try:
            _download(address, temporary)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"{name} could not be fetched from {address} ({getattr(error, 'reason', error)}); "
                f"without a network, get it by other means and save it as {path}"
            ) from None
        found = hashlib.sha256(temporary.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(
                f"what came from {address} is not {name}: its SHA-256 is {found}, not {sha256}"
            )
        if zipfile.is_zipfile(temporary):
            with zipfile.ZipFile(temporary) as archive:
                (inside,) = archive.namelist()
                text = archive.read(inside)
            temporary.write_bytes(text)
    return path


def _download(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer, path.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(answer, "read", size or None, desc="fetching") as watched:
            shutil.copyfileobj(watched, file)
        if size and file.tell() != size:
            raise ConnectionError(f"it broke off after {file.tell():,} of {size:,} bytes")


@contextlib.contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file to write, which becomes `path` if nothing goes wrong.

    Other processes may be writing the same one: each has a temporary file of its own.
    """
    temporary = path.with_suffix(f".{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
