"""Give damaged checkpoints and wild command lines to chargpt, and count what it makes of them.

python bench/fuzz.py 10000 2000    (checkpoints, command lines; Linux)

Each has to load or run, or to get one sentence: no traceback, no crash, nothing over 2 seconds
(checkpoints), nothing over 500 MB, no code that runs.
"""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from command_line import parse, whole_number

import sample
import train
from checkpoint import BEST, LAST, LOG, METADATA, load_checkpoint

MEMORY = 500 * 2**20
SECONDS = 2
# What Python announces before it runs code, another program, or a connection.
RUNS_CODE = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "socket.")
VALUES = [None, True, -1, 0, 1, 2**31, 10**400, 1e308, -0.5, "", "a", "\0", "ab" * 10**5, [], {}]
VALUES += [["a"], {"a": 1}, "\ud800", [0] * 10**5, "../../x", float("nan"), float("inf")]
SMALL = ["--n_layer", "1", "--n_head", "1", "--n_embd", "16", "--block_size", "8"]
SMALL += ["--batch_size", "2", "--max_steps", "2"]
TRAIN = ["book.txt"] * 9 + ["missing.txt", "-", "", ".", "out", "run", "empty.txt", "\udcff"]
TRAIN += ["--preset tiny", "--preset mini", "--preset wild.toml", "--preset=", "--preset ./"]
TRAIN += ["--out a", "--out b", "--out run", "--out book.txt", "--out book.txt/x", "--out="]
TRAIN += ["--resume run", "--resume a", "--resume missing", "--resume=", "--help", "--x", "--"]
SAMPLE = ["run"] * 9 + ["missing", "book.txt", "", "run/best.safetensors", "--help", "--length 5"]
SAMPLE += ["--prompt A", "--prompt é", "--prompt=", "--prompt_file book.txt", "--prompt_file ."]
SAMPLE += ["--stop A", "--temperature 0", "--top_k 1", "--top_p 0.1", "--unknown skip"]
# Work without end is no fault.
ENDLESS = {"max_steps", "length", "num_samples"}
WORDS = ["-1", "0", "1", "2", "7", "0.5", "1e-9", "1e300", "1e999", "nan", "x", "", "2147483647"]


class Trap:
    """A pickle that would leave a file behind if anything in it ran."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def damage(data: bytes, draw: random.Random) -> bytes:
    """Return a checkpoint with one of a dozen kinds of damage."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    record = json.loads(header["__metadata__"][METADATA])

    def with_header(text: str, record: str | None = None) -> bytes:
        if record is not None:
            text = json.dumps(header | {"__metadata__": {METADATA: record}})
        return len(text.encode()).to_bytes(8, "little") + text.encode() + numbers

    def flipped(end: int) -> bytes:
        changed = bytearray(data)
        for _ in range(draw.randint(1, 5)):
            changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
        return bytes(changed)

    def mutated(tree: dict | list, times: int) -> str:
        for _ in range(times):
            node = tree
            while True:
                key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
                if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.2:
                    break
                node = node[key]
            if draw.random() < 0.2:
                del node[key]
                if not node:
                    break
            else:
                node[key] = draw.choice([*VALUES, draw.randint(0, 10**6), draw.choice([*header])])
        return json.dumps(tree)

    def poisoned() -> bytes:
        place = 8 + length + 4 * draw.randrange(len(numbers) // 4)
        value = draw.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff"])
        return data[:place] + value + data[place + 4 :]

    deep = draw.choice(["[", '{"a":']) * 10 ** draw.randint(2, 6)
    kinds: list[Callable[[], bytes]] = [
        lambda: flipped(len(data)),
        lambda: flipped(8 + length),
        lambda: data[: draw.randrange(len(data))],
        lambda: data + draw.randbytes(draw.randint(1, 10**4)),
        lambda: draw.randint(0, 2 ** draw.randint(8, 63)).to_bytes(8, "little") + data[8:],
        lambda: with_header(mutated(header, draw.randint(1, 3))),
        lambda: with_header("", record=mutated(record, draw.randint(1, 3))),
        lambda: with_header("", record=mutated(record["model"], 0) + deep),
        lambda: with_header(deep),
        lambda: with_header("", record=deep),
        lambda: pickle.dumps(Trap()) + draw.randbytes(8),
        lambda: draw.randbytes(draw.randint(0, 10**4)),
        poisoned,
    ]
    return draw.choice(kinds)()


def wild_preset(draw: random.Random) -> str:
    """Return a TOML file of valid and invalid lines."""
    lines = ["[model]", "[train]", "[optimizer]", "[", "x", "[model.x]", "dropout = [1]", "n_layer"]
    keys = ["n_layer", "n_embd", "n_head", "max_steps", "dropout", "seed", "learning_rate", "é"]
    lines += [f"{key} = {value}" for key in keys for value in (1, 2, -1, 0.5, '"a"', "nan")]
    return "\n".join(draw.choices(lines, k=draw.randint(0, 4)))


def wild_log(draw: random.Random) -> str:
    """Return lines of which some are those of a log."""
    keys = ["step", "training_loss", "validation_loss", "seconds"]
    lines = [{key: draw.choice(VALUES[:9]) for key in keys} for _ in range(3)]
    return "\n".join([*map(json.dumps, lines), "[" * 9**5, "{}", "\0"])


def wild_words(draw: random.Random, own: list[str], sections: dict) -> list[str]:
    """Return a command line of valid and invalid parts."""
    flags = [name for section in sections.values() for name in section.__dataclass_fields__]
    words = []
    for _ in range(draw.randint(1, 5)):
        if draw.random() < 0.6:
            words += draw.choice(own).split(" ")
        else:
            flag, word = draw.choice(flags), draw.choice(WORDS)
            words += [f"--{flag}", "7" if flag in ENDLESS and word == WORDS[-1] else word]
    return words


def try_checkpoint(path: str) -> str:
    """Load a checkpoint, and set up a run from it if it is one to go on with."""
    try:
        model = load_checkpoint(Path(path)).model
        with torch.no_grad():
            if model(torch.zeros(1, 1, dtype=torch.int64)).shape != (1, 1, model.vocab_size):
                return "NO VALID MODEL"
        if Path(path).name == LAST:
            train.resume(Path(path).parent, [], {"text": {}, "train": {"max_steps": 10**6}})
    except (ValueError, OSError) as error:
        one_line = 0 < len(str(error)) < 1000 and "\n" not in str(error)
        return "sentence" if one_line else f"NO SENTENCE: {str(error)[:500]!r}"
    return "loaded"


def try_words(script: str, *words: str) -> str:
    """Run a script with these words; a refusal has to be one line and exit code 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = {"train": train, "sample": sample}[script].main(words)
        except SystemExit as exit_:
            code = exit_.code
    if code in (0, 1):
        return f"ran, exit code {code}"
    one_line = said.getvalue().startswith(f"{script}.py: ") and said.getvalue().count("\n") == 1
    return "sentence" if code == 2 and one_line else f"EXIT {code}: {said.getvalue()[:500]!r}"


def work(pipe: Connection, folder: str, memory: int) -> None:
    """Try what comes through the pipe, and answer with the outcome and the seconds it took."""
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        # What is imported on first use is imported now.
        try_checkpoint(f"run/{LAST}")
        sysconfig.get_path("stdlib")  # a record that names no text means Python's own source
    size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event) if event.startswith(RUNS_CODE) else None)
    for try_, arguments in iter(pipe.recv, None):
        events.clear()
        began = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                outcome = try_(*arguments)
            except BaseException as error:
                outcome = f"TRACEBACK {type(error).__name__}: {str(error)[:500]}"
        if try_ is try_checkpoint and events:
            outcome = f"RAN CODE: {events[0]}"
        pipe.send((outcome, time.perf_counter() - began))


class Worker:
    """A process that tries things, and is replaced when it dies or hangs."""

    def __init__(self, folder: str, memory: int):
        self.arguments = folder, memory
        self.process = None

    def run(self, try_: Callable[..., str], *arguments: str, seconds: float) -> str:
        """Return the outcome."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, end = context.Pipe()
            self.process = context.Process(target=work, args=(end, *self.arguments))
            self.process.start()
            end.close()
        self.pipe.send((try_, arguments))
        try:
            if self.pipe.poll(60):
                outcome, took = self.pipe.recv()
                return outcome if took < seconds else f"TOOK {took:.1f} S: {outcome}"
        except EOFError:
            pass
        self.process.kill()
        self.process.join()
        outcome = f"CRASH OR HANG, exit code {self.process.exitcode}"
        self.process = None
        return outcome

    def end(self) -> None:
        """Let the process go."""
        if self.process:
            self.pipe.send(None)
            self.process.join()


def report(title: str, outcomes: Counter) -> None:
    """Print how often each outcome came."""
    print(f"{title}:")
    for outcome, times in outcomes.most_common():
        print(f"  {times:6,} {outcome}")


def main() -> None:
    """Try checkpoints, then command lines, and print the outcomes."""
    asked = parse(__doc__, checkpoints=whole_number, lines=whole_number)
    n_checkpoints, n_lines = asked.checkpoints, asked.lines
    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("book.txt").write_text("To be, or not to be: that is the question.\n" * 20)
        Path("empty.txt").touch()
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(["book.txt", "--out", "run", *SMALL])
        Path("damaged").mkdir()
        worker, outcomes = Worker(folder, MEMORY), Counter()
        for i in tqdm(range(n_checkpoints), desc="checkpoints"):
            name = (BEST, LAST)[i % 2]
            data = damage(Path("run", name).read_bytes(), draw)
            Path("damaged", name).write_bytes(data)
            Path("damaged", LOG).write_text(wild_log(draw))
            outcome = worker.run(try_checkpoint, f"damaged/{name}", seconds=SECONDS)
            outcomes[outcome] += 1
        outcomes["TRAPPED"] += Path("trapped").exists()
        worker.end()
        report(f"{n_checkpoints:,} damaged checkpoints", +outcomes)
        # Command lines train, which takes more memory than loading.
        worker, outcomes = Worker(folder, 8 * MEMORY), Counter()
        for _ in tqdm(range(n_lines), desc="command lines"):
            Path("wild.toml").write_text(wild_preset(draw), encoding="utf-8")
            script = draw.choice(["train", "train", "sample"])
            if script == "train":
                words = [*SMALL, *wild_words(draw, TRAIN, train.SECTIONS)]
            else:
                words = wild_words(draw, SAMPLE, sample.SECTIONS)
            outcome = worker.run(try_words, script, *words, seconds=60)
            outcomes[outcome if outcome[0].islower() else f"{outcome} {script} {words}"] += 1
            for run in "ab":
                shutil.rmtree(run, ignore_errors=True)
        worker.end()
        report(f"{n_lines:,} command lines and presets", outcomes)


if __name__ == "__main__":
    main()
