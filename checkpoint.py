"""What a run looks like on disk: out/<text>-<preset>/ with two checkpoints and a log.

best.safetensors has the averaged weights with the lowest validation loss, for writing and sharing.
last.safetensors has the newest weights, their average and the optimizer, for going on.
log.jsonl has a line for each evaluation, and curve.svg, where it can be drawn, its picture.

A checkpoint is a safetensors file: it holds numbers and one JSON text, and nothing in it can run.
"""

import contextlib
import copy
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config import build
from data import Vocabulary
from model import GPT, GPTConfig
from optimizer import Optimizer

OUT = Path("out")
BEST, LAST, LOG = "best.safetensors", "last.safetensors", "log.jsonl"
CURVE = "curve.svg"

FORMAT = 2
# Bytes: room for a vocabulary of all of Unicode and 300 layers. Reading it takes up to 25 times as
# much memory.
LONGEST_HEADER = 2**24
# Safetensors metadata is a map without order; one entry keeps the bytes of equal runs equal.
METADATA = "chargpt"
AVERAGE, OPTIMIZER = "average.", "optimizer."
# What a run needs of its log when it goes on, and a comparison to show it.
LOGGED = {
    "step": int,
    "training_loss": float | None,
    "validation_loss": float,
    "seconds": float,
    "sample": str,
}
# What reading a record with missing or wrong parts raises.
MALFORMED = (KeyError, TypeError, AttributeError, RecursionError)
LONGEST_REASON, LONGEST_PATH = 300, 4096


@dataclass
class Progress:
    """How far a run has come: the state of the training loop besides weights and optimizer."""

    step: int = 0
    # A run that goes on may know a best of a later step.
    best_loss: float | None = None
    best_step: int = 0
    # The step of the last evaluation, which is not made again when the run goes on from there.
    evaluated_step: int | None = None
    # The training losses since then.
    loss_sum: float = 0.0
    loss_count: int = 0
    # The windows that go through the model at once since memory ran out.
    windows: int | None = None
    # The steps between evaluations, as planned.
    eval_interval: int | None = None

    def __post_init__(self):
        evaluated = self.step if self.evaluated_step is None else self.evaluated_step
        if not 0 <= evaluated <= self.step or self.best_step < 0:
            raise ValueError("its steps contradict each other")
        if self.loss_count < 0 or (self.best_loss is None and self.best_step > 0):
            raise ValueError("its losses contradict each other")
        for name in ("windows", "eval_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass
class Checkpoint:
    """A model, and everything that is needed to use it, to go on with it, or to make it again."""

    model: GPT
    vocabulary: Vocabulary
    # The text's paths, length and fingerprint.
    text: dict[str, Any]
    # The settings besides the model's, by section.
    settings: dict[str, dict[str, Any]]
    progress: Progress = field(default_factory=Progress)
    # What only last.safetensors has: averaged weights, and what the optimizer remembers, as
    # "<parameter>.<what>".
    average: GPT | None = None
    optimizer: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that at every moment the file is whole: the old one or the new one.

    Raises FloatingPointError for numbers that are not finite: they would replace good ones.
    """
    record = {
        "format": FORMAT,
        "model": asdict(checkpoint.model.config),
        "vocabulary": checkpoint.vocabulary.characters,
        "text": checkpoint.text,
        "settings": checkpoint.settings,
        "progress": asdict(checkpoint.progress),
    }
    average = checkpoint.average.state_dict() if checkpoint.average else {}
    tensors = checkpoint.model.state_dict()
    tensors |= {AVERAGE + name: tensor for name, tensor in average.items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in checkpoint.optimizer.items()}
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if not _all_finite(contents):
        raise FloatingPointError(f"{path} would hold numbers that are not finite")
    write_whole(path, safetensors.torch.save(contents, {METADATA: json.dumps(record)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises ValueError with one sentence if it is damaged or not one.

    Nothing is believed before it is checked: what a file says of itself costs neither memory
    nor time until the sizes fit each other and the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        return _load(path)
    except (SafetensorError, json.JSONDecodeError, *MALFORMED):
        raise ValueError(f"{path} cannot be used: it is damaged, or no checkpoint") from None
    except ValueError as error:
        reason = str(error)[:LONGEST_REASON]
        raise ValueError(f"{path} cannot be used: {reason}") from None


def _load(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > LONGEST_HEADER:
            raise ValueError("it is damaged, or no checkpoint")
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get(METADATA)
        if written is None:
            raise ValueError("chargpt did not write it")
        record = json.loads(written)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}; this version reads {FORMAT}")
        if record["model"].keys() != {field.name for field in fields(GPTConfig)}:
            raise ValueError("its model settings are incomplete")
        (config,) = build({"model": GPTConfig}, {"model": record["model"]})
        vocabulary = Vocabulary(record["vocabulary"])
        # On the meta device a model has shapes but no memory: the file brings the numbers.
        try:
            with torch.device("meta"), _Undrawn():
                model = GPT(config, len(vocabulary))
        except RuntimeError:
            raise ValueError("its settings are those of a model too large for any memory") from None
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        names = set(file.keys())
        prefixes = ["", AVERAGE] if any(name.startswith(AVERAGE) for name in names) else [""]
        # AdamW remembers three tensors of each parameter.
        if len(names) > 5 * len(shapes) or any(
            prefix + name not in names or file.get_slice(prefix + name).get_shape() != shape
            for name, shape in shapes.items()
            for prefix in prefixes
        ):
            raise ValueError("its weights do not have the shapes that its settings say")
        # Copies, so that nothing looks into the file any more when it is replaced.
        tensors = {name: file.get_tensor(name).clone() for name in sorted(names)}
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise ValueError("its numbers are not all float32")
    if not _all_finite(tensors):
        raise ValueError("its numbers are not all finite")
    average = copy.deepcopy(model) if AVERAGE in prefixes else None
    for module, prefix in zip((model, average), prefixes, strict=False):
        module.load_state_dict({name: tensors.pop(prefix + name) for name in shapes}, assign=True)
    if not all(name.startswith(OPTIMIZER) for name in tensors):
        raise ValueError("it holds more than a model and its optimizer")
    (progress,) = build({"progress": Progress}, {"progress": record["progress"]})
    text, settings = record["text"], record["settings"]
    if not (
        isinstance(text["paths"], list)
        and all(isinstance(word, str) for word in [*text["paths"], text["sha256"]])
        and isinstance(text["characters"], int)
    ):
        raise ValueError("its record of the text is damaged")
    if any(len(path) > LONGEST_PATH for path in text["paths"]):
        raise ValueError("its record of the text has a path longer than any")
    if not all(isinstance(values, dict) for values in settings.values()):
        raise ValueError("its record of the settings is damaged")
    return Checkpoint(
        model=model,
        vocabulary=vocabulary,
        text=text,
        settings=settings,
        progress=progress,
        average=average,
        optimizer={name.removeprefix(OPTIMIZER): tensor for name, tensor in tensors.items()},
    )


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of initial numbers; those of a checkpoint take their place.

    To draw them where there is no memory for them, torch loads its compiler, which takes a second.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def load_model(path: str | Path) -> tuple[GPT, Vocabulary]:
    """Return the model of a checkpoint file, or the best of a run folder, and its vocabulary.

    Where only last.safetensors was brought along, or no trained model has been evaluated yet, that
    has the model.
    """
    path, last = Path(path), Path(path) / LAST
    if path.is_dir():
        path = path / BEST if (path / BEST).exists() else last
    checkpoint = load_checkpoint(path)
    if checkpoint.progress.step == 0 and last.exists():
        checkpoint = load_checkpoint(last)
    return checkpoint.average or checkpoint.model, checkpoint.vocabulary


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder; raises ValueError if one does already.

    The system releases the lock when this process ends, however it ends. What one that was killed
    left half-written is removed. (Windows cannot lock a folder: there, nothing is refused.)
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            if not try_lock(descriptor):
                raise ValueError(
                    f"another process is training in {folder}; wait for it or stop it (a new run "
                    "can have another folder, with --out)"
                )
        for name in (BEST, LAST, LOG, CURVE):
            _temporary(folder / name).unlink(missing_ok=True)
        yield


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder, and tell whether it worked: not if another process holds it.

    A process that is given the descriptor holds the lock, too. (Windows has no such locks, nor do
    some network file systems: there, it always works.)
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


def newest_run() -> Path:
    """Return the run below out/ that was last trained."""
    runs = [file.parent for file in OUT.rglob(BEST)]
    # Only these: what else lies there may be gone, or no file, when it is looked at.
    saved = [run / name for run in runs for name in (BEST, LAST) if (run / name).exists()]
    if not saved:
        raise FileNotFoundError(
            f"there is no run below {OUT.resolve()} yet; train one: python train.py"
        )
    return max(saved, key=os.path.getmtime).parent


def find_run(path: str) -> Path:
    """Return the path of a run that exists, or say which one was probably meant."""
    run = Path(path)
    if not run.exists():
        known = [str(file.parent) for file in OUT.rglob(BEST)]
        nearest = difflib.get_close_matches(path, known, n=1, cutoff=0)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise FileNotFoundError(f"there is no run {path!r}{hint}")
    if run.is_dir() and not any((run / name).exists() for name in (BEST, LAST)):
        raise FileNotFoundError(f"the folder {path!r} does not hold a run")
    return run


def write_log(run: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write the log anew: a JSON object a line, one line for each evaluation."""
    log = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(run / LOG, log.encode())


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; what is no line of a log is left out."""
    if not (run / LOG).exists():
        return []
    lines = []
    # Only a line feed ends a line: a sample may contain what else splitlines() would split at.
    for written in (run / LOG).read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(written)
            if isinstance(line, dict) and all(
                isinstance(line.get(key), kind) for key, kind in LOGGED.items()
            ):
                lines.append(line)
    return lines


def optimizer_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Return what optimizers remember of each parameter, as "<parameter>.<what>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{what}": tensor
        for optimizer in optimizers
        for parameter, memory in optimizer.state.items()
        for what, tensor in memory.items()
    }


def restore_optimizers(
    model: nn.Module, optimizers: Iterable[Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Give optimizers the memory that `optimizer_tensors` returned of others."""
    own = optimizer_tensors(model, optimizers)
    shapes, expected = ({name: x.shape for name, x in of.items()} for of in (tensors, own))
    if shapes != expected:
        raise ValueError("the optimizer's part of the checkpoint does not fit the model")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _all_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file durably and at once: a crash leaves the old one or the new one, whole."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name lives in the folder, which has to reach the disk as well; where a file system
        # refuses that, the file is there all the same.
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(folder)
        os.close(folder)


def _sync(descriptor: int) -> None:
    """Wait until a file is on the disk itself, not in a cache of the disk's, as far as possible."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, but for some network file systems
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
