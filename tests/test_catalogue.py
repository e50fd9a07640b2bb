"""A text known by name is fetched once, and only what it should be is kept."""

import hashlib
import http.server
import io
import os
import socket
import threading
import zipfile
from pathlib import Path

import pytest
from conftest import characters

from data import TextConfig, catalogue, read_text

PLAY = b"To be, or not to be: that is the question.\n"


def zipped(text: bytes) -> bytes:
    """Pack a text into a zip file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inside.txt", text)
    return packed.getvalue()


SERVED = {"/play": PLAY, "/play.zip": zipped(PLAY)}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Serve a text from this machine; what is asked for is noted."""
    asked = []
    monkeypatch.setenv("no_proxy", "*")

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path in SERVED else 404)
            self.end_headers()
            self.wfile.write(SERVED.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    address = f"http://127.0.0.1:{server.server_port}"
    sha256, sha256_of_zip = (hashlib.sha256(served).hexdigest() for served in SERVED.values())
    entries = {
        "play": (f"{address}/play", sha256),
        "packed": (f"{address}/play.zip", sha256_of_zip),
        "other": (f"{address}/play", "0" * 64),
        "gone": (f"{address}/gone", sha256),
    }
    monkeypatch.setattr(catalogue, "CATALOGUE", catalogue.CATALOGUE | entries)
    monkeypatch.setattr("data.files.CATALOGUE", catalogue.CATALOGUE)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield asked
    server.shutdown()
    server.server_close()


def test_text_is_fetched_once(asked):
    for _ in range(2):
        text = read_text(["play"], TextConfig())
        assert (text.name, characters(text)) == ("play", PLAY.decode())
    assert asked == ["/play"]
    assert os.listdir("out/texts") == ["play.txt"]


def test_file_of_that_name_is_taken_instead(asked):
    Path("play").write_text("own")
    assert characters(read_text(["play"], TextConfig())) == "own"
    assert asked == []


def test_zipped_text_is_unpacked(asked):
    assert characters(read_text(["packed"], TextConfig())) == PLAY.decode()
    assert os.listdir("out/texts") == ["packed.txt"]


def test_text_that_is_not_what_it_should_be_is_not_kept(asked):
    with pytest.raises(ValueError, match=r"is not other: its SHA-256 is .*, not 0000"):
        read_text(["other"], TextConfig())
    assert os.listdir("out/texts") == []


def test_text_that_cannot_be_had_is_said(asked, monkeypatch):
    with pytest.raises(ConnectionError, match=r"gone could not be fetched .*Not Found.*save it as"):
        read_text(["gone"], TextConfig())
    with socket.socket() as deaf:
        # Nobody listens there, and nobody else can have the port.
        deaf.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}/far"
        unreachable = {"far": (address, "0" * 64)}
        monkeypatch.setattr(catalogue, "CATALOGUE", unreachable)
        monkeypatch.setattr("data.files.CATALOGUE", unreachable)
        with pytest.raises(ConnectionError, match="refused"):
            read_text(["far"], TextConfig())
    assert os.listdir("out/texts") == []


def test_file_of_that_name_comes_first(asked):
    with open("play", "w") as file:
        file.write("mine")
    assert characters(read_text(["play"], TextConfig())) == "mine"
    assert asked == []
