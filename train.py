"""Train a character-level GPT on a text: python train.py book.txt"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import (
    BEST,
    LAST,
    LOG,
    OUT,
    Checkpoint,
    Progress,
    append_to_log,
    cut_log,
    find_run,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizers,
    save_checkpoint,
)
from config import (
    Device,
    Precision,
    SettingsParser,
    Values,
    bad_input_exits,
    build,
    choose_device,
    choose_precision,
    load_preset,
    run_script,
)
from data import (
    Text,
    Vocabulary,
    fit_block_size,
    read_text,
    split,
)
from model import GPT, GPTConfig, SamplingConfig
from optimizer import (
    Optimizer,
    OptimizerConfig,
    make_optimizers,
    memory_shapes,
    schedule,
)
from training import EVALUATED_CHARACTERS, evaluate, make_step

SAMPLE_LENGTH = 200


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and where."""

    batch_size: Annotated[int, "windows of text in each step"] = 16
    max_steps: Annotated[int, "steps in the whole run"] = 3000
    minutes: Annotated[float | None, "train for this long instead of max_steps"] = None
    eval_interval: Annotated[int | None, "steps between evaluations; none: up to ten in a run"] = (
        None
    )
    seed: Annotated[int, "the same seed gives the same run"] = 1
    device: Annotated[Device, "where to train"] = "auto"
    dtype: Annotated[Precision, "type of the numbers that are multiplied"] = "auto"

    def __post_init__(self):
        for name in ("batch_size", "max_steps", "eval_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; it must be more than 0")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


SECTIONS = {"model": GPTConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
# What may differ when a run goes on; everything else is as it was.
CHANGEABLE = ("max_steps", "minutes", "eval_interval", "device")


@dataclass
class Run:
    """What one run of training works with."""

    folder: Path
    paths: list[str]
    text: Text
    vocabulary: Vocabulary
    model: GPT
    optimizers: list[Optimizer]
    optimizer_config: OptimizerConfig
    config: TrainConfig
    precision: torch.dtype
    training_ids: Tensor
    validation_ids: Tensor
    progress: Progress
    # What the run took before it was resumed.
    seconds_before: float = 0.0

    def save(self, name: str) -> None:
        """Write best.safetensors, the weights alone, or last.safetensors, with the optimizer."""
        checkpoint = Checkpoint(
            model=self.model,
            vocabulary=self.vocabulary,
            text={
                "paths": self.paths,
                "characters": len(self.text.characters),
                "sha256": self.text.sha256,
            },
            settings={"optimizer": asdict(self.optimizer_config), "train": asdict(self.config)},
            progress=self.progress,
            optimizer=optimizer_tensors(self.model, self.optimizers) if name == LAST else {},
        )
        save_checkpoint(self.folder / name, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model as the command line says, and return the exit code."""
    started = time.perf_counter()
    with bad_input_exits("train.py"):
        arguments, flags = command_line().parse(argv)
        if {"max_steps", "minutes"} <= flags["train"].keys():
            raise ValueError("--max_steps and --minutes both say how long to train; give one")
        run = begin(arguments, flags) if arguments.resume is None else resume(arguments, flags)
        if "max_steps" in flags["train"]:
            run.config = replace(run.config, minutes=None)
        minutes = run.config.minutes
        deadline = None if minutes is None else started + 60 * minutes
        pace = rehearse(run)
        run.config = plan(run, pace, deadline)
        run.folder.mkdir(parents=True, exist_ok=True)
    return train(run, pace, deadline)


def command_line() -> SettingsParser:
    """Return the parser of what can be said on the command line."""
    about = (
        "Train a character-level GPT on a text. The defaults below are those of the preset small; "
        "other presets change some of them, and flags change any."
    )
    parser = SettingsParser("train.py", "TEXT ...", about, SECTIONS)
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="text files and folders, UTF-8; without any, the source of Python's own library",
    )
    parser.add_argument(
        "--preset",
        help="tiny, mini, small, medium, base, the path of a .toml file, or auto (the default), "
        "which chooses by device and length of text",
    )
    parser.add_argument("--out", metavar="RUN", help="run folder (default: out/<text>-<preset>)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    return parser


def begin(arguments: argparse.Namespace, flags: Values) -> Run:
    """Set up a new run, saying what was decided and why."""
    text = read_text(arguments.texts)
    n_characters = len(text.characters)
    preset, preset_reason = arguments.preset, "as asked"
    if preset in (None, "auto"):
        device, _ = choose_device(flags["train"].get("device", "auto"))
        preset, preset_reason = choose_preset(device, n_characters)
    model_config, optimizer_config, config = build(SECTIONS, load_preset(preset, SECTIONS), flags)
    folder = OUT / f"{text.name}-{Path(preset).stem}"
    if arguments.out is not None:
        folder = Path(arguments.out)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the run with --out")
    if any((folder / name).exists() for name in (BEST, LAST, LOG)):
        raise ValueError(
            f"{folder} already holds a run; go on with it by "
            f"--resume {shlex.quote(folder.as_posix())}, or name another folder with --out"
        )
    block_size = fit_block_size(n_characters, model_config.block_size)
    describe_text(text)
    if block_size < model_config.block_size:
        print(
            f"warning: {n_characters:,} characters are few, so the context shrinks "
            f"from {model_config.block_size} to {block_size} characters"
        )
        model_config = replace(model_config, block_size=block_size)
    print(f"preset   {preset}: {preset_reason}")
    vocabulary = Vocabulary.of(text.characters)
    torch.manual_seed(config.seed)
    model = GPT(model_config, len(vocabulary))
    return assemble(
        folder, arguments.texts, text, vocabulary, model, optimizer_config, config, Progress()
    )


def resume(arguments: argparse.Namespace, flags: Values) -> Run:
    """Set up a run as it was when it was last saved."""
    if arguments.preset is not None or arguments.out is not None:
        raise ValueError("--resume goes on with a run as it is; leave out --preset and --out")
    folder = find_run(arguments.resume)
    if folder.is_file():
        folder = folder.parent
    checkpoint = load_checkpoint(folder / LAST)
    settings = checkpoint.settings | {"model": asdict(checkpoint.model.config)}
    if settings.keys() != SECTIONS.keys():
        raise ValueError(f"{folder / LAST} cannot be used: its settings are incomplete")
    saved = dict(zip(SECTIONS, build(SECTIONS, settings), strict=True))
    for section, values in flags.items():
        for key, value in values.items():
            before = getattr(saved[section], key)
            if key not in CHANGEABLE and value != before:
                raise ValueError(
                    f"{folder} was trained with {key} {before}, which cannot become {value}; "
                    f"when going on, only {', '.join(CHANGEABLE)} can change"
                )
    _, optimizer_config, config = build(SECTIONS, settings, flags)
    step = checkpoint.progress.step
    if config.minutes is None and config.max_steps <= step:
        raise ValueError(
            f"{folder} is at step {step:,} and max_steps is {config.max_steps:,}; "
            f"to go on, give a larger one, such as --max_steps {2 * step or 1}"
        )
    paths = arguments.texts or checkpoint.text["paths"]
    try:
        text = read_text(paths)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; if the text of this run has moved, say where it is: "
            f"python train.py TEXT --resume {shlex.quote(folder.as_posix())}"
        ) from None
    if text.sha256 != checkpoint.text["sha256"]:
        raise ValueError(
            f"this is not the text that {folder} was trained on, or it has changed since; "
            f"to go on, name the same text: train.py TEXT --resume {shlex.quote(folder.as_posix())}"
        )
    describe_text(text)
    run = assemble(
        folder,
        paths,
        text,
        checkpoint.vocabulary,
        checkpoint.model,
        optimizer_config,
        config,
        checkpoint.progress,
    )
    expected = memory_shapes(run.model, run.optimizers) if step else {}
    restore_optimizers(run.model, run.optimizers, checkpoint.optimizer, expected)
    run.seconds_before = cut_log(folder, step)
    print(f"resumed  {folder} at step {step:,}")
    return run


def assemble(
    folder: Path,
    paths: list[str],
    text: Text,
    vocabulary: Vocabulary,
    model: GPT,
    optimizer_config: OptimizerConfig,
    config: TrainConfig,
    progress: Progress,
) -> Run:
    """Bring model and text to the device, and say what will be trained there."""
    device, device_reason = choose_device(config.device)
    precision, precision_reason = choose_precision(config.dtype, device, model.config.n_embd)
    model.to(device)
    total, in_blocks = model.count_parameters()
    print(
        f"model    {total:,} parameters, {in_blocks:,} without embeddings and head; "
        f"it looks back {model.config.block_size} characters"
    )
    print(
        f"device   {device} ({device_reason}), "
        f"{str(precision).removeprefix('torch.')} ({precision_reason})"
    )
    training_ids, validation_ids = split(vocabulary.encode(text.characters).to(device))
    return Run(
        folder,
        paths,
        text,
        vocabulary,
        model,
        make_optimizers(model, optimizer_config, precision),
        optimizer_config,
        config,
        precision,
        training_ids,
        validation_ids,
        progress,
    )


def choose_preset(device: torch.device, n_characters: int) -> tuple[str, str]:
    """Return the preset that suits a device and a text, and the reason."""
    if device.type == "cpu":
        if n_characters < 300_000:
            return "mini", "a short text, and a CPU learns it in a minute or two"
        return "small", "what a CPU trains well in a few minutes"
    if n_characters < 300_000:
        return "medium", "a short text, which a larger model would learn by heart"
    return "base", "a GPU trains the largest in minutes"


def describe_text(text: Text) -> None:
    """Say what was read."""
    n_characters = len(text.characters)
    files = "1 file" if text.n_files == 1 else f"{text.n_files} files"
    skipped = f" ({text.n_skipped} binary left out)" if text.n_skipped else ""
    print(
        f"text     {text.name}, {files}{skipped}: {n_characters:,} characters, "
        f"{len(set(text.characters)):,} different, begins {text.characters[:60]!r}"
    )


@dataclass
class Pace:
    """How long a step and an evaluation take, in seconds; corrected as the run goes."""

    step: float
    evaluation: float

    def steps_until(self, deadline: float, eval_interval: float) -> int:
        """Return how many steps, with their evaluations and one at the end, fit before a time."""
        left = deadline - time.perf_counter() - self.evaluation / 2
        return max(1, int(left / (self.step + self.evaluation / eval_interval)))


def rehearse(run: Run) -> Pace:
    """Time training steps on a copy of the model, which is then thrown away."""
    model = copy.deepcopy(run.model)
    optimizers = make_optimizers(model, run.optimizer_config, run.precision)
    take_step = step_function(replace(run, model=model, optimizers=optimizers))

    def seconds_of_a_step() -> float:
        began = time.perf_counter()
        take_step(0, 1).item()
        return time.perf_counter() - began

    step = seconds_of_a_step()
    # The first step loads and compiles kernels: where steps are fast, the next five tell more.
    if step < 1:
        step = statistics.median(seconds_of_a_step() for _ in range(5))
    batch = run.config.batch_size * model.config.block_size
    # The forward pass is a third of a step's arithmetic.
    return Pace(step, step / 3 * min(len(run.validation_ids), EVALUATED_CHARACTERS) / batch)


def plan(run: Run, pace: Pace, deadline: float | None) -> TrainConfig:
    """Fix how many steps there will be and when to evaluate, and say what to expect.

    Unless an interval is asked for, evaluations are planned to take about a tenth of the time:
    ten in a run, or fewer.
    """
    config, start = run.config, run.progress.step
    steps = config.max_steps - start
    if deadline is not None:
        steps = pace.steps_until(deadline, eval_interval=math.inf)
    interval = config.eval_interval
    if interval is None:
        evaluations = min(max(0.1 * steps * pace.step / pace.evaluation, 1), 10)
        interval = math.ceil(steps / evaluations)
    about = ""
    if deadline is not None:
        about, steps = "about ", pace.steps_until(deadline, interval)
    batch = config.batch_size * run.model.config.block_size
    times = steps * batch / len(run.training_ids)
    print(
        f"plan     {about}{steps:,} steps of {config.batch_size} x {run.model.config.block_size} "
        f"characters, reading the training text {times:{',.0f' if times >= 10 else '.2g'}} times "
        f"in about {duration(steps * (pace.step + pace.evaluation / interval) + pace.evaluation)}"
    )
    if len(run.validation_ids) > EVALUATED_CHARACTERS:
        print(
            f"         validation reads {EVALUATED_CHARACTERS:,} of "
            f"{len(run.validation_ids):,} characters"
        )
    return replace(config, max_steps=start + steps, minutes=None, eval_interval=interval)


def step_function(run: Run) -> Callable[[int, int], Tensor]:
    """Return the function that makes one step of this run, from step and max_steps."""
    return make_step(
        run.model,
        run.optimizers,
        run.optimizer_config,
        run.training_ids,
        run.config.batch_size,
        run.config.seed,
        run.precision,
    )


def write_sample(run: Run) -> str:
    """Return a short text from the same prompt and the same seed each time."""
    device = run.training_ids.device
    prompt = run.vocabulary.encode(run.vocabulary.start)[None].to(device)
    generator = torch.Generator(device).manual_seed(run.config.seed)
    with contextlib.closing(run.model.generate(prompt, SamplingConfig(), generator)) as ids:
        return run.vocabulary.decode(int(i) for i in itertools.islice(ids, SAMPLE_LENGTH))


class StopRequest:
    """While it is entered, Ctrl-C asks for a stop after the step; a second one stops at once."""

    made = False

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, *_: Any) -> None:
        self.made = True
        # A signal may arrive in the middle of a print, which print does not bear.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, self._previous)


def train(run: Run, pace: Pace, deadline: float | None) -> int:
    """Train until max_steps or Ctrl-C, and return the exit code.

    With a deadline, max_steps is corrected at each evaluation by the speed so far.
    """
    progress, start, began, evaluating = run.progress, run.progress.step, time.perf_counter(), 0.0
    take_step = step_function(run)
    loss_sum = torch.tensor(progress.loss_sum, device=run.training_ids.device)
    bar = tqdm(
        total=run.config.max_steps,
        initial=start,
        unit="char",
        unit_scale=run.config.batch_size * run.model.config.block_size,
        disable=None,
    )
    with bar, StopRequest() as stop:
        for step in itertools.count(start):
            progress.step, at_end = step, step == run.config.max_steps
            due = step % run.config.eval_interval == 0 or at_end
            if due and step != progress.evaluated_step:
                progress.loss_sum = loss_sum.item()
                evaluation_began = time.perf_counter()
                validation_loss = evaluate(run.model, run.validation_ids, run.precision)
                if not math.isfinite(validation_loss + progress.loss_sum):
                    return diverged(run)
                record(run, validation_loss, evaluation_began - began)
                loss_sum.zero_()
                pace.evaluation = time.perf_counter() - evaluation_began
                evaluating += pace.evaluation
                if step > start:
                    pace.step = (time.perf_counter() - began - evaluating) / (step - start)
                if deadline is not None and not at_end:
                    max_steps = step + pace.steps_until(deadline, run.config.eval_interval)
                    run.config, bar.total = replace(run.config, max_steps=max_steps), max_steps
            if at_end or stop.made:
                break
            loss = take_step(step, run.config.max_steps)
            loss_sum += loss
            progress.loss_count += 1
            if bar.update():
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if not at_end:
        progress.loss_sum = loss_sum.item()
        if not math.isfinite(progress.loss_sum):
            return diverged(run)
        run.save(LAST)
        print(f"\nstopped and saved at step {step:,} of {run.config.max_steps:,}")
    say_farewell(run)
    return 0 if at_end else 130


def record(run: Run, validation_loss: float, seconds: float) -> None:
    """Log an evaluation, save the run, and show how it is going.

    The log comes first: what it has too much when the machine stops in between is cut off when
    the run resumes, but what it lacks would be missing for ever.
    """
    progress, step = run.progress, run.progress.step
    training_loss = progress.loss_sum / progress.loss_count if progress.loss_count else None
    sample = write_sample(run)
    line = {
        "step": step,
        "training_loss": training_loss,
        "validation_loss": validation_loss,
        "learning_rate": run.optimizer_config.learning_rate
        * schedule(step, run.config.max_steps, run.optimizer_config),
        "seconds": round(run.seconds_before + seconds, 3),
        "sample": sample,
    }
    append_to_log(run.folder, line)
    progress.evaluated_step, progress.loss_sum, progress.loss_count = step, 0.0, 0
    # An untrained model is never the best, however lucky on a short validation part.
    if progress.best_step == 0 or validation_loss < progress.best_loss:
        progress.best_loss, progress.best_step = validation_loss, step
        run.save(BEST)
    run.save(LAST)
    trained = "" if training_loss is None else f"training {training_loss:.4f}, "
    tqdm.write(
        f"\nstep {step:,} of {run.config.max_steps:,}: {trained}"
        f"validation {validation_loss:.4f} nats, {bits(validation_loss):.4f} bits per character; "
        f"best {progress.best_loss:.4f} at step {progress.best_step:,}"
    )
    tqdm.write("\n".join(f"    {row}".rstrip() for row in sample.splitlines()))


def diverged(run: Run) -> int:
    """Say that the loss is not a number any more, and what to do; return the exit code."""
    rates = {"learning_rate": run.optimizer_config.learning_rate}
    if run.optimizer_config.optimizer == "muon":
        rates["muon_learning_rate"] = run.optimizer_config.muon_learning_rate
    lower = " ".join(f"--{name} {rate / 3:.2g}" for name, rate in rates.items())
    print(
        f"\ntrain.py: at step {run.progress.step:,} the loss is not a number any more, so the run "
        f"stops; the checkpoints in {run.folder} are from the evaluation before; the learning "
        f"rate is probably too high: try {lower} in another --out",
        file=sys.stderr,
    )
    return 1


def say_farewell(run: Run) -> None:
    """Say what came out, where it lies, and how to use it and go on with it."""
    progress, folder = run.progress, shlex.quote(run.folder.as_posix())
    more = f" --max_steps {2 * progress.step}" if progress.step == run.config.max_steps else ""
    print(
        f"\nbest validation loss {progress.best_loss:.4f} nats, {bits(progress.best_loss):.4f} "
        f"bits per character, at step {progress.best_step:,}: {run.folder / BEST}\n"
        f"write with it:  python sample.py {folder}\n"
        f"go on with it:  python train.py --resume {folder}{more}"
    )


def bits(nats: float) -> float:
    """Convert a loss in nats to bits."""
    return nats / math.log(2)


def duration(seconds: float) -> str:
    """Write a time for people: 45 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    run_script(main)
