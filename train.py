"""Train a character-level GPT on a text: python train.py book.txt"""

import argparse
import contextlib
import copy
import itertools
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    find_run,
    load_checkpoint,
    lock_run,
    optimizer_tensors,
    read_log,
    restore_optimizers,
    save_checkpoint,
    write_log,
)
from config import (
    Device,
    DoesNotFitError,
    Precision,
    SettingsParser,
    StopRequest,
    Values,
    bad_input_exits,
    build,
    choose_device,
    choose_precision,
    describe_os_error,
    harmless,
    load_preset,
    ran_out_of_memory,
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
from training import EVALUATED_CHARACTERS, Pieces, evaluate, make_step, piece_size

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
    save_minutes: Annotated[float, "the run is saved after this long, and at evaluations"] = 5.0
    patience: Annotated[
        int | None, "stop after this many evaluations without gain; none: go on"
    ] = None
    seed: Annotated[int, "the same seed gives the same run"] = 1
    device: Annotated[Device, "where to train"] = "auto"
    dtype: Annotated[Precision, "type of the numbers that are multiplied"] = "auto"

    def __post_init__(self):
        for name in ("batch_size", "max_steps", "eval_interval", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("minutes", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


SECTIONS = {"model": GPTConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
# What may differ when a run goes on; everything else is as it was.
CHANGEABLE = ("max_steps", "minutes", "eval_interval", "save_minutes", "patience", "device")


@dataclass
class Run:
    """What one run of training works with."""

    folder: Path
    paths: list[str]
    text: Text
    vocabulary: Vocabulary
    model: GPT
    # The averaged weights, which are evaluated and kept.
    average: GPT
    optimizers: list[Optimizer]
    optimizer_config: OptimizerConfig
    config: TrainConfig
    precision: torch.dtype
    training_ids: Tensor
    validation_ids: Tensor
    progress: Progress
    pieces: Pieces
    # The lines of log.jsonl, and those that could not be written yet.
    log: list[dict[str, Any]] = field(default_factory=list)
    # What the run had taken when it was resumed.
    seconds_before: float = 0.0
    # The step of last.safetensors, and when that was written.
    saved_step: int = 0
    saved_at: float = 0.0
    # What a resumed run was to take in all when it was saved.
    max_steps_before: int | None = None

    def save(self, name: str) -> None:
        """Write best.safetensors, the average, or last.safetensors, with what goes on changing."""
        checkpoint = Checkpoint(
            model=self.model if name == LAST else self.average,
            vocabulary=self.vocabulary,
            text={
                "paths": self.paths,
                "characters": len(self.text.characters),
                "sha256": self.text.sha256,
            },
            settings={"optimizer": asdict(self.optimizer_config), "train": asdict(self.config)},
            progress=self.progress,
        )
        if name == LAST:
            checkpoint.average = self.average
            checkpoint.optimizer = optimizer_tensors(self.model, self.optimizers)
        save_checkpoint(self.folder / name, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model as the command line says, and return the exit code."""
    started = time.perf_counter()
    with contextlib.ExitStack() as until_the_end:
        with bad_input_exits("train.py"):
            arguments, flags = command_line().parse(argv)
            if {"max_steps", "minutes"} <= flags["train"].keys():
                raise ValueError("--max_steps and --minutes both say how long to train; give one")
            if arguments.resume is None:
                run = begin(arguments, flags)
            else:
                folder = folder_to_resume(arguments)
                until_the_end.enter_context(lock_run(folder))
                run = resume(folder, arguments.texts, flags)
            if "max_steps" in flags["train"]:
                run.config = replace(run.config, minutes=None)
            minutes = run.config.minutes
            deadline = None if minutes is None else started + 60 * minutes
            pace = rehearse(run)
            run.config = plan(run, pace, deadline)
            if arguments.resume is None:
                run.folder.mkdir(parents=True, exist_ok=True)
                until_the_end.enter_context(lock_run(run.folder))
                # A folder that cannot be written is found out now, and not after an hour.
                run.save(LAST)
        try:
            return train(run, pace, deadline)
        except (FloatingPointError, MemoryError, RuntimeError) as error:
            print(f"\ntrain.py: {explain(run, error)}", file=sys.stderr)
            return 1


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
        folder, arguments.texts, text, vocabulary, model, None, optimizer_config, config, Progress()
    )


def folder_to_resume(arguments: argparse.Namespace) -> Path:
    """Return the folder of the run that the command line wants to go on with."""
    if arguments.preset is not None or arguments.out is not None:
        raise ValueError("--resume goes on with a run as it is; leave out --preset and --out")
    run = find_run(arguments.resume)
    return run.parent if run.is_file() else run


def resume(folder: Path, paths: list[str], flags: Values) -> Run:
    """Set up a run as it was when it was last saved; paths, if any, say where its text is now."""
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
    step, evaluated = checkpoint.progress.step, checkpoint.progress.evaluated_step
    if config.minutes is None and config.max_steps <= step:
        raise ValueError(
            f"{folder} is at step {step:,} and max_steps is {config.max_steps:,}; "
            f"to go on, give a larger one, such as --max_steps {2 * step or 1}"
        )
    paths = paths or checkpoint.text["paths"]
    try:
        text = read_text(paths)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; if the text of this run has moved, say where it is: "
            f"python train.py TEXT --resume {shlex.quote(folder.as_posix())}"
        ) from None
    if text.sha256 != checkpoint.text["sha256"]:
        before, now = checkpoint.text["characters"], len(text.characters)
        differs = f"{now:,} characters instead of {before:,}"
        if now == before:
            differs = f"as many characters, {now:,}, but not the same ones"
        raise ValueError(
            f"this is not the text that {folder} was trained on, or it has changed since: it has "
            f"{differs}; to go on, name the same text: "
            f"python train.py TEXT --resume {shlex.quote(folder.as_posix())}"
        )
    describe_text(text)
    run = assemble(
        folder,
        paths,
        text,
        checkpoint.vocabulary,
        checkpoint.model,
        checkpoint.average,
        optimizer_config,
        config,
        checkpoint.progress,
    )
    expected = memory_shapes(run.model, run.optimizers) if step else {}
    restore_optimizers(run.model, run.optimizers, checkpoint.optimizer, expected)
    # Lines after the last save come anew.
    if evaluated is not None:
        run.log = [line for line in read_log(folder) if line["step"] <= evaluated]
        run.seconds_before = run.log[-1]["seconds"] if run.log else 0.0
    run.saved_step = step
    run.max_steps_before = saved["train"].max_steps
    if config.patience is not None and len(evaluations_since_best(run)) >= config.patience:
        raise ValueError(
            f"{folder} has stopped early, {len(evaluations_since_best(run))} evaluations after its "
            f"best, step {run.progress.best_step:,}; to go on, give a larger --patience"
        )
    write_log(folder, run.log)
    print(f"resumed  {folder} at step {step:,}")
    return run


def assemble(
    folder: Path,
    paths: list[str],
    text: Text,
    vocabulary: Vocabulary,
    model: GPT,
    average: GPT | None,
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
        copy.deepcopy(model) if average is None else average.to(device),
        make_optimizers(model, optimizer_config, precision),
        optimizer_config,
        config,
        precision,
        training_ids,
        validation_ids,
        progress,
        Pieces(piece_size(config.batch_size, model.config.block_size, device)),
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
    model, average = copy.deepcopy(run.model), copy.deepcopy(run.average)
    optimizers = make_optimizers(model, run.optimizer_config, run.precision)
    take_step = step_function(replace(run, model=model, average=average, optimizers=optimizers))

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
    before, now = run.max_steps_before, start + steps
    if before not in (None, now):
        shares = [schedule(start, end, run.optimizer_config) for end in (before, now)]
        print(
            f"schedule max_steps {before:,} becomes {now:,}: at step {start:,} the learning rate "
            f"is {shares[1]:.0%} of its highest instead of {shares[0]:.0%}"
        )
    return replace(config, max_steps=now, minutes=None, eval_interval=interval)


def step_function(run: Run) -> Callable[[int, int], Tensor]:
    """Return the function that makes one step of this run, from step and max_steps."""
    return make_step(
        run.model,
        run.average,
        run.optimizers,
        run.optimizer_config,
        run.training_ids,
        run.config.batch_size,
        run.config.seed,
        run.precision,
        run.pieces,
    )


def write_sample(run: Run) -> str:
    """Return a short text from the same prompt and the same seed each time."""
    device = run.training_ids.device
    prompt = run.vocabulary.encode(run.vocabulary.start)[None].to(device)
    generator = torch.Generator(device).manual_seed(run.config.seed)
    with contextlib.closing(run.average.generate(prompt, SamplingConfig(), generator)) as ids:
        return run.vocabulary.decode(int(i) for i in itertools.islice(ids, SAMPLE_LENGTH))


def train(run: Run, pace: Pace, deadline: float | None) -> int:
    """Train until max_steps, an early stop or a signal, and return the exit code.

    With a deadline, max_steps is corrected at each evaluation by the speed so far. Raises
    FloatingPointError as soon as a loss, a gradient or a weight is seen not to be finite.
    """
    progress, start, began, evaluating = run.progress, run.progress.step, time.perf_counter(), 0.0
    take_step = step_function(run)
    loss_sum = torch.tensor(progress.loss_sum, device=run.training_ids.device)
    run.saved_at = began
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
                validation_loss = evaluate(run.average, run.validation_ids, run.precision)
                record(run, finite(validation_loss), evaluation_began - began)
                loss_sum.zero_()
                pace.evaluation = time.perf_counter() - evaluation_began
                evaluating += pace.evaluation
                if step > start:
                    pace.step = (time.perf_counter() - began - evaluating) / (step - start)
                if deadline is not None and not at_end:
                    max_steps = step + pace.steps_until(deadline, run.config.eval_interval)
                    run.config, bar.total = replace(run.config, max_steps=max_steps), max_steps
            if at_end or stop.made or out_of_patience(run):
                break
            if time.perf_counter() > run.saved_at + 60 * run.config.save_minutes:
                progress.loss_sum = loss_sum.item()
                keep(run)
            loss = take_step(step, run.config.max_steps)
            loss_sum += loss
            progress.loss_count += 1
            # Looking at a number makes Python wait for a GPU, so there it is done now and then.
            if bar.update() or loss.device.type == "cpu":
                bar.set_postfix(loss=f"{finite(loss.item()):.3f}", refresh=False)
    if run.saved_step != progress.step:
        progress.loss_sum = loss_sum.item()
        keep(run)
    return farewell(run, stop)


def finite(loss: float) -> float:
    """Return a loss that is a finite number; any other is a FloatingPointError."""
    if not math.isfinite(loss):
        raise FloatingPointError
    return loss


def record(run: Run, validation_loss: float, seconds: float) -> None:
    """Log an evaluation, save the run, and show how it is going."""
    progress, step = run.progress, run.progress.step
    training_loss = None
    if progress.loss_count:
        training_loss = finite(progress.loss_sum / progress.loss_count)
    sample = write_sample(run)
    run.log.append(
        {
            "step": step,
            "training_loss": training_loss,
            "validation_loss": validation_loss,
            "learning_rate": run.optimizer_config.learning_rate
            * schedule(step, run.config.max_steps, run.optimizer_config),
            "seconds": round(run.seconds_before + seconds, 3),
            "sample": sample,
        }
    )
    progress.evaluated_step, progress.loss_sum, progress.loss_count = step, 0.0, 0
    # An untrained model is never the best, however lucky on a short validation part.
    improved = progress.best_step == 0 or validation_loss < progress.best_loss
    keep(run, validation_loss if improved else None)
    trained = "" if training_loss is None else f"training {training_loss:.4f}, "
    tqdm.write(
        f"\nstep {step:,} of {run.config.max_steps:,}: {trained}"
        f"validation {nats_and_bits(validation_loss)}; "
        f"{describe_best(progress)}"
    )
    if is_overfitting(run):
        tqdm.write(
            f"overfitting since step {progress.best_step:,}: validation has risen while training "
            f"fell; {BEST} keeps that step, Ctrl-C stops, and --patience 3 would stop by itself"
        )
    tqdm.write("\n".join(f"    {harmless(row)}".rstrip() for row in sample.splitlines()))


def keep(run: Run, improved_to: float | None = None) -> None:
    """Write the log, the best model if it has just improved, and the run to go on with.

    The order matters when the machine stops in between: what the log or the best has too much
    comes again when the run resumes, but what they lack would be missing for ever. A disk that
    refuses gets a warning, and the next save tries again.
    """
    progress = run.progress
    best = progress.best_loss, progress.best_step
    try:
        write_log(run.folder, run.log)
        if improved_to is not None:
            progress.best_loss, progress.best_step = improved_to, progress.step
            run.save(BEST)
            best = progress.best_loss, progress.best_step
        run.save(LAST)
        run.saved_step = progress.step
    except OSError as error:
        progress.best_loss, progress.best_step = best
        tqdm.write(
            f"\ncould not save step {progress.step:,}: {describe_os_error(error)}; {LAST} is still "
            f"that of step {run.saved_step:,}, and the next save tries again",
            file=sys.stderr,
        )
    run.saved_at = time.perf_counter()


def evaluations_since_best(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the log after that of the best evaluation."""
    return [line for line in run.log if line["step"] > run.progress.best_step]


def out_of_patience(run: Run) -> bool:
    """Tell whether so many evaluations brought no gain that the run is to stop."""
    patience = run.config.patience
    return patience is not None and len(evaluations_since_best(run)) >= patience


def is_overfitting(run: Run) -> bool:
    """Tell whether two evaluations or more were worse than the best, with a lower training loss."""
    since = evaluations_since_best(run)
    losses = {line["step"]: line["training_loss"] for line in run.log}
    at_best = losses.get(run.progress.best_step)
    return len(since) >= 2 and at_best is not None and since[-1]["training_loss"] < at_best


def explain(run: Run, error: Exception) -> str:
    """Say what ended a run that was going on, and what to do; what is unknown is raised again."""
    step, config = run.progress.step, run.optimizer_config
    if isinstance(error, FloatingPointError):
        rates = {"learning_rate": config.learning_rate}
        if config.optimizer == "muon":
            rates["muon_learning_rate"] = config.muon_learning_rate
        share = schedule(step, run.config.max_steps, config)
        now = " and ".join(f"{name} {rate * share:.2g}" for name, rate in rates.items())
        lower = " ".join(f"--{name} {rate / 3:.2g}" for name, rate in rates.items())
        sentence = (
            f"at step {step:,}, with {now}, the loss or its gradient is not a number any more, so "
            f"the run stops; the rate is probably too high: try {lower} in another --out"
        )
    elif isinstance(error, DoesNotFitError):
        sentence = f"at step {step:,} {error}"
    elif ran_out_of_memory(error):
        sentence = f"at step {step:,} memory ran out; other programs may be using it"
    else:
        raise error
    return f"{sentence}; {run.folder / LAST} keeps step {run.saved_step:,}"


def farewell(run: Run, stop: StopRequest) -> int:
    """Say what came out and how to use it and go on with it; return the exit code."""
    progress, folder = run.progress, shlex.quote(run.folder.as_posix())
    step, max_steps = progress.step, run.config.max_steps
    if run.saved_step != step:
        print(
            f"\ntrain.py: step {step:,} could not be saved, so what came after step "
            f"{run.saved_step:,} is lost; make room, then python train.py --resume {folder}",
            file=sys.stderr,
        )
        return 1
    more = f" --max_steps {2 * step}"
    if step < max_steps and stop.made:
        more = ""
        print(f"\nstopped and saved at step {step:,} of {max_steps:,}")
    elif step < max_steps:
        more = f" --patience {2 * run.config.patience}"
        print(f"\nstopped early at step {step:,}: no gain since step {progress.best_step:,}")
    print(
        f"\nvalidation loss: {describe_best(progress)}: {run.folder / BEST}\n"
        f"write with it:  python sample.py {folder}\n"
        f"go on with it:  python train.py --resume {folder}{more}"
    )
    return stop.exit_code if step < max_steps else 0


def describe_best(progress: Progress) -> str:
    """Say how good the best model is that was saved."""
    if progress.best_loss is None:
        return "no best yet"
    return f"best {nats_and_bits(progress.best_loss)} at step {progress.best_step:,}"


def nats_and_bits(loss: float) -> str:
    """Write a loss in both units of information."""
    return f"{loss:.4f} nats, {loss / math.log(2):.4f} bits per character"


def duration(seconds: float) -> str:
    """Write a time for people: 45 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    run_script(main)
