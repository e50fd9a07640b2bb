"""Texts of the field that are known by name, and how they are fetched."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

TEXTS = Path("out/texts")
# Where each text lies, and its SHA-256.
CATALOGUE = {
    # Tiny Shakespeare (Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks",
    # 2015): 40,000 lines of plays.
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
PATIENCE = 20  # seconds without an answer
BLOCK = 2**16


def fetch(name: str) -> Path:
    """Return the file of a text in the catalogue, which is fetched if it is not there yet.

    Raises ConnectionError if it cannot be had, and ValueError if it is not what it should be.
    """
    address, sha256 = CATALOGUE[name]
    path = TEXTS / f"{name}.txt"
    if path.exists():
        return path
    temporary = path.with_suffix(f".{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _download(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer, path.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc="fetching") as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
