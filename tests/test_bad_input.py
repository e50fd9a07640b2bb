"""Each wrong input gets one sentence and exit code 2, and leaves nothing behind."""

import gzip
import os
import pickle
import random
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tarfile
import wave
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SMALL

import sample
import train

TRAIN = [
    ("--val_text= book.txt", "there is no file or folder ''"),
    ("latins", "latin.txt is not in UTF-8 (byte 0xeb at position 2)"),
    ("missing.txt", "there is no file or folder 'missing.txt'\n"),
    ("gone.txt", "there is no file or folder 'gone.txt'\n"),
    ("shakespere", "there is no file or folder 'shakespere' (did you mean 'shakespeare'?)"),
    ("Bok.TXT", "there is no file or folder 'Bok.TXT' (did you mean 'book.txt'?)"),
    ("latins/lati.txt", "no file or folder 'latins/lati.txt' (did you mean 'latins/latin.txt'?)"),
    ("empty.txt", "empty.txt is empty"),
    ("empty", "there is no text file in the folder empty"),
    ("pictures", "there is no text file in the folder pictures"),
    ("pictures/a.png", "a.png is a picture, not plain text; name a file that was saved as .txt"),
    (
        "latin.txt",
        "latin.txt is not in UTF-8 (byte 0xeb at position 2); it may be in cp1252 ('ë!')",
    ),
    ("book.txt --encoding utf9", "there is no encoding 'utf9'; among those there are auto, utf_8,"),
    (
        "latin.txt --encoding ascii",
        "latin.txt is not in ascii, or is damaged or cut off (byte 0xeb at position 2)",
    ),
    ("pictures --glob *.txt", "there is no text file that matches *.txt in the folder pictures"),
    ("damaged.gz", "damaged.gz cannot be decompressed: "),
    ("/dev/null", "/dev/null is a device, not a file with a text"),
    ("book.txt --val_fraction 1", "val_fraction is 1.0; it must be between 0 and 1"),
    (
        "book.txt --val_text book.txt --val_fraction 0.2",
        "--val_text and --val_fraction both say what to validate on; give one",
    ),
    ("book.txt --val_text missing.txt", "there is no file or folder 'missing.txt'"),
    ("book.txt --min_count 0", "min_count is 0; it must be at least 1"),
    ("short.txt", "4 characters to train on and 1 to validate on, but it takes at least 18 and 2"),
    ("book.txt --preset smal", "no preset 'smal' (did you mean small?); choose from"),
    ("book.txt --preset=", "there is no preset ''; choose from"),
    ("book.txt --preset mine.toml", "there is no preset file mine.toml"),
    ("book.txt --preset wrong.toml", "[model] has no key 'n_layers' (did you mean n_layer?)"),
    ("book.txt --preset broken.toml", "broken.toml is not a TOML file"),
    ("book.txt --n_layers 4", "no use for '--n_layers' (did you mean --n_layer?)"),
    ("book.txt --n_layer four", "n_layer is 'four'; it must be a whole number"),
    ("book.txt --n_layer 1.5", "n_layer is '1.5'; it must be a whole number"),
    ("book.txt --n_layer -1", "n_layer is -1; it must be at least 1"),
    ("book.txt --n_layer", "expected one argument"),
    ("book.txt --n_embd 30 --n_head 4", "n_embd 30 is not divisible by n_head 4"),
    ("book.txt --learning_rate nan", "learning_rate is nan; it must be a finite number"),
    ("book.txt --learning_rate 0", "learning_rate is 0.0; it must be more than 0, at"),
    ("book.txt --muon_learning_rate 1e300", "muon_learning_rate is 1e+300; it must be more than 0"),
    ("book.txt --dropout 1", "dropout is 1.0; it must be at least 0 and less than 1"),
    ("book.txt --device gpu", "device is 'gpu'"),
    ("book.txt --dtype float16", "dtype is 'float16'; it must be auto or float32 or bfloat16"),
    ("book.txt --batch_size 0", "batch_size is 0; it must be at least 1"),
    ("book.txt --minutes 0", "minutes is 0.0; it must be more than 0"),
    ("book.txt --minutes 1 --max_steps 9", "give one"),
    ("book.txt --save_minutes 0", "save_minutes is 0.0; it must be more than 0"),
    ("book.txt --patience 0", "patience is 0; it must be at least 1"),
    ("book.txt --n_layer 1001", "n_layer is 1001; it must be at most 1000"),
    ("book.txt --seed -1", "seed is -1"),
    ("book.txt --out out/trained", "already holds a run; go on with it by --resume out/trained"),
    ("book.txt --out book.txt", "book.txt is a file; name a folder for the run with --out"),
    ("book.txt --out out/best-only", "already holds a run"),
    ("book.txt --out=", "--out is empty; name a folder for the run"),
    (". --out .", ". is the text; name another folder for the run with --out"),
    ("book.txt --val_text . --out .", ". is the text; name another folder"),
    ("book.txt --n_embd 2000000000", "not enough memory"),
    ("book.txt --batch_size 99999999999999999999", "a whole number below 2^31"),
    ("book.txt --epochs 3", "there is no use for '--epochs'; see --help"),
    ("book.txt --resume=", "the folder '' does not hold a run"),
    ("--resume book.txt", "book.txt is no run; --resume takes the folder of one"),
    ("--resume out/trianed", "there is no run 'out/trianed' (did you mean 'out/trained'?)"),
    ("--resume out/trained", "out/trained is at step 20 and max_steps is 20"),
    ("--resume out/trained --max_steps 9", "out/trained is at step 20 and max_steps is 9"),
    ("--resume out/trained --n_layer 5", "was trained with n_layer 3, which cannot become 5"),
    ("--resume out/trained --preset base", "leave out --preset and --out"),
    (
        "other.txt --resume out/trained --max_steps 30",
        "has changed since: it has 33 characters instead of 6,",
    ),
    ("--resume out/damaged", "last.safetensors cannot be used: it is damaged"),
    ("--resume out/best-only", "out/best-only has no last.safetensors, and to go on takes that"),
]

SAMPLE = [
    ("out/trianed", "there is no run 'out/trianed' (did you mean 'out/trained'?)"),
    ("empty", "the folder 'empty' does not hold a run"),
    ("book.txt", "book.txt cannot be used: it is damaged, or no checkpoint"),
    ("foreign.safetensors", "chargpt did not write it"),
    ("out/damaged", "best.safetensors cannot be used: it is damaged"),
    ("out/trained --prompt -Ada", "one that begins with a dash is written --flag=VALUE"),
    ("out/trained --length 99999999999999999999", "a whole number below 2^31"),
    ("out/trained --prompt Adé", "'é' (character 3; nearest known: 'e'); --unknown skip"),
    ("out/trained --prompt_file missing", "there is no file or folder 'missing'"),
    ("out/trained --prompt a --prompt_file b", "give one"),
    ("out/trained --score book.txt --stop a", "--score writes nothing, so leave out --stop"),
    ("out/trained --score book.txt --top_k 3", "--score writes nothing, so leave out --top_k"),
    ("out/trained --score percent.txt", "the model does not know '%' (character 1;"),
    (
        "out/trained --score percent.txt --unknown skip",
        "too few characters that the model knows: 0",
    ),
    ("out/trained --score missing", "there is no file or folder 'missing'"),
    ("out/trained --copied_from missing", "there is no file or folder 'missing'"),
    ("out/trained --stop %", "--stop '%' will never be written"),
    ("out/trained --stop=", "stop is empty"),
    ("out/trained --temperature -1", "temperature is -1.0; it must be from 0 (greedy) to 1e30"),
    ("out/trained --temperature 1e39", "temperature is 1e+39; it must be from 0 (greedy) to 1e30"),
    ("out/trained --temperature hot", "temperature is 'hot'; it must be a finite number"),
    ("out/trained --top_k 0", "top_k is 0; it must be at least 1"),
    ("out/trained --top_p 0", "top_p is 0.0"),
    ("out/trained --top_p 1.1", "top_p is 1.1"),
    ("out/trained --min_p 2", "min_p is 2.0"),
    ("out/trained --length 0", "length is 0; it must be at least 1"),
    ("out/trained --num_samples 0", "num_samples is 0; it must be at least 1"),
    ("out/trained --unknown drop", "unknown is 'drop'; it must be refuse or skip"),
    ("out/trained --temprature 1", "no use for '--temprature' (did you mean --temperature?)"),
    ("out/trained out/trained", "there is no use for 'out/trained'"),
    ("out/trained --seed 1e3", "seed is '1e3'; it must be a whole number"),
]


@pytest.fixture
def _inputs(trained):
    """Everything that the commands above name."""
    Path("percent.txt").write_text("%")
    Path("empty.txt").touch()
    Path("gone.txt").symlink_to("nowhere")
    Path("empty").mkdir()
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"\x89PNG\0")
    Path("latin.txt").write_bytes("Zoë!".encode("latin-1"))
    Path("damaged.gz").write_bytes(gzip.compress(b"To be, or not to be" * 9)[:-9])
    Path("latins").mkdir()
    shutil.copy("latin.txt", "latins")
    Path("short.txt").write_text("short")
    Path("other.txt").write_text("Another text than the one before.")
    Path("wrong.toml").write_text("[model]\nn_layers = 4\n")
    Path("broken.toml").write_text("[model\n")
    safetensors.torch.save_file({"weight": torch.zeros(1)}, "foreign.safetensors")
    for run in ("out/damaged", "out/best-only"):
        Path(run).mkdir()
    for name in ("best.safetensors", "last.safetensors"):
        whole = Path(trained, name).read_bytes()
        Path("out/damaged", name).write_bytes(whole[:-100])
    shutil.copy(f"{trained}/best.safetensors", "out/best-only")


def contents() -> dict:
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


@pytest.mark.usefixtures("_inputs")
@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [(train, *case) for case in TRAIN] + [(sample, *case) for case in SAMPLE],
)
def test_wrong_input_gets_a_sentence(script, words, sentence, capsys):
    before = contents()
    with pytest.raises(SystemExit) as exit_:
        script.main(words.split(" "))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert sentence in error
    assert error.startswith(f"{script.__name__}.py: ")
    assert error.count("\n") == 1
    assert contents() == before


def test_closed_standard_input_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert exit_code(["-"]) == 2
    assert "train.py: standard input is closed" in capsys.readouterr().err


def test_empty_standard_input_gets_a_sentence(monkeypatch, capsys):
    with open(os.devnull) as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        assert exit_code(["-"]) == 2
    assert "train.py: standard input is empty" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="there is no such shell")
def test_closed_output_is_no_fault():
    words = ["sh", "-c", 'exec "$0" "$1" --help >&- 2>&-', sys.executable, sample.__file__]
    assert subprocess.run(words).returncode == 0


def test_text_with_a_long_name_is_read():
    name = 80 * "李"
    Path(f"{name}.txt").write_text("a text " * 20)
    assert exit_code([f"{name}.txt", *SMALL, "--max_steps", "2"]) == 0
    assert Path("out", f"{40 * '李'}-tiny").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names of files are UTF-8")
def test_text_whose_name_is_not_utf8_is_read():
    name = os.fsdecode(b"\xff\xfe.txt")
    Path(name).write_text("a text " * 20)
    assert exit_code([name, *SMALL, "--max_steps", "2"]) == 0
    assert Path("out/text-tiny").is_dir()


def test_text_of_one_character_is_learned(capsys):
    Path("book.txt").write_text("a" * 60)
    assert exit_code(["book.txt", *SMALL, "--max_steps", "2"]) == 0
    said = capsys.readouterr().out
    # There is nothing to choose from, and nothing to be below of.
    assert re.search(r"uniform 0.000, unigram 0.000, .* xz 0.000; this model 0.000\n", said)


def test_without_a_run_sample_says_how_to_get_one(capsys):
    with pytest.raises(SystemExit) as exit_:
        sample.main([])
    assert exit_.value.code == 2
    assert "out yet; train one: python train.py" in capsys.readouterr().err


def exit_code(words: list[str]) -> int:
    """Train, and return the exit code."""
    try:
        return train.main(words)
    except SystemExit as exit_:
        return exit_.code


def test_random_bytes_become_a_run_or_get_a_sentence(capsys):
    draw, codes = random.Random(7), []
    for i in range(60):
        # A third of them are a text: all bytes below 128 are.
        highest = 127 if i % 3 == 0 else 255
        bytes_ = bytes(draw.randint(1, highest) for _ in range(draw.randint(0, 400)))
        Path("bytes").write_bytes(bytes_)
        codes.append(exit_code(["bytes", *SMALL, "--max_steps", "2", "--out", "run"]))
        error = capsys.readouterr().err
        if codes[-1] == 0:
            shutil.rmtree("run")
        else:
            assert error.startswith("train.py: ")
            assert error.count("\n") == 1
        assert list(contents()) == [Path("bytes")]
    assert set(codes) == {0, 2}


def write_binary(kind: str) -> None:
    """Write a file of a kind that is no text."""
    if kind == "png":
        header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        Path("file.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    elif kind == "zip":
        with zipfile.ZipFile("file.zip", "w") as archive:
            archive.writestr("book.txt", "Once upon a time")
    elif kind == "tar":
        with tarfile.open("file.tar", "w") as archive:
            archive.add(__file__)
    elif kind == "wav":
        with wave.open("file.wav", "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(range(256)) * 20)
    elif kind == "sqlite":
        with sqlite3.connect("file.sqlite") as database:
            database.execute("CREATE TABLE words (word TEXT)")
    elif kind == "program":
        with open(sys.executable, "rb") as program:
            Path("file.program").write_bytes(program.read(2**20))
    elif kind == "pdf":
        Path("file.pdf").write_bytes(b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n")
    elif kind == "rtf":
        Path("file.rtf").write_bytes(b"{\\rtf1 Once upon a time}")
    elif kind == "npy":
        np.save("file.npy", np.arange(100.0))
    elif kind == "pickle":
        Path("file.pickle").write_bytes(pickle.dumps({"words": [1.5, "two"]}))
    elif kind == "safetensors":
        safetensors.torch.save_file({"weight": torch.ones(20)}, "file.safetensors")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("png", "a picture, not plain text"),
        ("zip", "a zip file, as .docx, .odt and .epub are, not plain text"),
        ("pdf", "a PDF document, not plain text"),
        ("rtf", "an RTF document, not plain text"),
        ("program", "a program, not plain text"),
        ("tar", "(binary|not in UTF-8)"),
        ("wav", "(binary|not in UTF-8)"),
        ("sqlite", "(binary|not in UTF-8)"),
        ("npy", "(binary|not in UTF-8)"),
        ("pickle", "(binary|not in UTF-8)"),
        ("safetensors", "(binary|not in UTF-8)"),
    ],
)
def test_binary_file_gets_a_sentence_and_is_left_out_in_a_folder(kind, said, capsys):
    write_binary(kind)
    assert exit_code([f"file.{kind}", *SMALL]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"train\.py: file\.{kind} is {said}", error)
    assert error.count("\n") == 1
    if kind != "safetensors":  # a folder with one of those is that of a run
        Path("text.txt").write_text("a text " * 20)
        assert exit_code([".", *SMALL, "--max_steps", "2", "--out", "run"]) == 0
        assert "1 file (1 binary left out)" in capsys.readouterr().out
