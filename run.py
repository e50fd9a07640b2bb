"""One run: what it works with, set up anew or as it was when it was last saved."""

import argparse
import contextlib
import copy
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from checkpoint import (
    BEST,
    LAST,
    LOG,
    LONGEST_REASON,
    OUT,
    Checkpoint,
    Progress,
    load_checkpoint,
    optimizer_tensors,
    read_log,
    restore_optimizers,
    save_checkpoint,
)
from config import Sections, Values, build, load_preset
from config.hardware import Device, Precision, choose_device, choose_precision, to_device
from data import STANDARD_INPUT, Text, TextConfig, Vocabulary, coverage, fit_block_size, read_text
from model import GPT, GPTConfig
from optimizer import Optimizer, OptimizerConfig, make_optimizers
from training import divide_among_threads, make_step


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


# With more of the text unknown, what is learned of the rest is worth little.
MANY_UNKNOWN = 0.02
# In runs of about this many readings without dropout, on a CPU, what `auto` chooses was at its best
# after 3 to 28, on 14 stretches of 3,000 to 300,000 characters in English, Chinese and Python.
ENOUGH_READINGS = 30

SECTIONS = {
    "model": GPTConfig,
    "optimizer": OptimizerConfig,
    "text": TextConfig,
    "train": TrainConfig,
}
# What may differ when a run goes on; everything else is as it was.
CHANGEABLE = ["max_steps", "minutes", "eval_interval", "save_minutes", "patience", "device"]
CHANGEABLE += ["encoding", "glob", "val_text"]


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
    text_config: TextConfig
    config: TrainConfig
    precision: torch.dtype
    training_ids: Tensor
    validation_ids: Tensor
    progress: Progress
    # The lines of log.jsonl, and those that could not be written yet.
    log: list[dict[str, Any]] = field(default_factory=list)
    # What the run had taken when it was resumed.
    seconds_before: float = 0.0
    # The best model, until it is on disk.
    unsaved_best: Checkpoint | None = None
    # The step of last.safetensors.
    saved_step: int = 0
    # What a resumed run was to take in all when it was saved.
    max_steps_before: int | None = None

    def save_best(self) -> None:
        """Write best.safetensors, if there is a new best model."""
        if self.unsaved_best is not None:
            save_checkpoint(self.folder / BEST, self.unsaved_best)
            self.unsaved_best = None

    def save_last(self) -> None:
        """Write last.safetensors, with all that it takes to go on."""
        save_checkpoint(self.folder / LAST, self.checkpoint())
        self.saved_step = self.progress.step

    def checkpoint(self) -> Checkpoint:
        """Return all that last.safetensors holds."""
        return Checkpoint(
            model=self.model,
            vocabulary=self.vocabulary,
            text={
                "paths": self.paths,
                "characters": self.text.n_characters,
                "sha256": self.text.sha256,
            },
            settings={
                "optimizer": asdict(self.optimizer_config),
                "text": asdict(self.text_config),
                "train": asdict(self.config),
            },
            progress=replace(self.progress),  # a best may be saved later than it is noted
            average=self.average,
            optimizer=optimizer_tensors(self.model, self.optimizers),
        )

    def note_best(self, loss: float) -> None:
        """Take the average as it is now for the best model, which is still to be saved."""
        self.progress.best_loss, self.progress.best_step = loss, self.progress.step
        # A copy, because a disk that is full now may not be later.
        self.unsaved_best = replace(
            self.checkpoint(), model=copy.deepcopy(self.average), average=None, optimizer={}
        )


def begin(arguments: argparse.Namespace, flags: Values) -> Run:
    """Set up a new run, saying what was decided and why."""
    preset, preset_reason = "auto" if arguments.preset is None else arguments.preset, "as asked"
    is_auto = preset == "auto"
    if is_auto:
        _, text_config, _ = build_all_but_model(SECTIONS, flags)
    else:
        chosen = load_preset(preset, SECTIONS)
        _, _, text_config, _ = build(SECTIONS, chosen, flags)
    if arguments.out is not None:
        if not arguments.out:
            raise ValueError("--out is empty; name a folder for the run")
        out = Path(arguments.out)
        # The text would be taken for a run when it goes on.
        texts = [*arguments.texts, *filter(None, [flags["text"].get("val_text")])]
        if out.is_dir() and out.resolve() in [Path(path).resolve() for path in texts]:
            raise ValueError(f"{out} is the text; name another folder for the run with --out")
        if not arguments.dry_run:
            refuse_to_overwrite(out)
    text = read_text(arguments.texts, text_config)
    n_characters = text.n_characters
    if is_auto:
        device, _ = choose_device(flags["train"].get("device", "auto"))
        preset, preset_reason = choose_preset(device, text.n_training)
        chosen = load_preset(preset, SECTIONS)
    model_config, optimizer_config, text_config, config = build(SECTIONS, chosen, flags)
    folder = OUT / f"{text.name}-{Path(preset).stem}"
    if arguments.out is not None:
        folder = Path(arguments.out)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the run with --out")
    if not arguments.dry_run:
        refuse_to_overwrite(folder)
    n_training = text.n_training
    block_size = fit_block_size(n_training, n_characters - n_training, model_config.block_size)
    describe_text(text)
    if block_size < model_config.block_size:
        print(
            f"warning: {n_training:,} characters are few, so the context shrinks "
            f"from {model_config.block_size} to {block_size} characters"
        )
        model_config = replace(model_config, block_size=block_size)
    as_asked = {"max_steps", "minutes"} & flags["train"].keys()
    if is_auto and not as_asked and not model_config.dropout:
        enough = math.ceil(ENOUGH_READINGS * n_training / (config.batch_size * block_size))
        # In a shorter run, the learning rates would fall soon after they have risen.
        enough = max(enough, 10 * optimizer_config.warmup_steps)
        if enough < config.max_steps:
            preset_reason += (
                f"; it takes {enough:,} steps instead of {config.max_steps:,}, because more only "
                "teach it by heart"
            )
            config = replace(config, max_steps=enough)
    print(f"preset   {preset}: {preset_reason}")
    vocabulary = Vocabulary.of_counts(text.counts, text_config.min_count)
    if unknown := text.counts.keys() - set(vocabulary.characters):
        share = sum(text.counts[character] for character in unknown) / n_characters
        kind = "warning:" if share > MANY_UNKNOWN else "note    "
        print(
            f"{kind} {len(unknown):,} characters that come fewer than {text_config.min_count} "
            f"times, {share:.2%} of the text, become one; {len(vocabulary):,} are left"
        )
    torch.manual_seed(config.seed)
    model = GPT(model_config, len(vocabulary))
    total, in_blocks = model.count_parameters()
    if in_blocks < total / 2:
        print(f"note     {1 - in_blocks / total:.0%} of the parameters are embeddings and head")
        if text_config.min_count == 1 and (hint := coverage(text.counts)):
            print(f"         {hint}")
    start = Checkpoint(model, vocabulary, {}, {}, average=copy.deepcopy(model))
    return assemble(folder, arguments.texts, text, start, optimizer_config, text_config, config)


def build_all_but_model(sections: Sections, flags: Values) -> list[Any]:
    """Make all settings but those of the model: whether they fit, a preset decides later."""
    names = [name for name in sections if name != "model"]
    return build({name: sections[name] for name in names}, {name: flags[name] for name in names})


def refuse_two_validation_parts(flags: Values) -> None:
    """Raise ValueError if flags say in two ways what to validate on."""
    if {"val_text", "val_fraction"} <= flags["text"].keys():
        raise ValueError("--val_text and --val_fraction both say what to validate on; give one")


def refuse_to_overwrite(folder: Path) -> None:
    """Raise ValueError if there is a run in a folder."""
    if any((folder / name).exists() for name in (BEST, LAST, LOG)):
        raise ValueError(
            f"{folder} already holds a run; go on with it by "
            f"--resume {shlex.quote(folder.as_posix())}, or name another folder with --out"
        )


def resume(folder: Path, paths: list[str], flags: Values) -> Run:
    """Set up a run as it was when it was last saved; paths, if any, say where its text is now."""
    if not (folder / LAST).exists():
        raise FileNotFoundError(
            f"{folder} has no {LAST}, and to go on takes that; with {BEST} alone, a run can write "
            f"only: python sample.py {shlex.quote(folder.as_posix())}"
        )
    checkpoint = load_checkpoint(folder / LAST)
    if checkpoint.average is None:
        raise ValueError(
            f"{folder / LAST} cannot be used: it has a model only, and no average of it"
        )
    saved = settings_of(folder / LAST, checkpoint)
    for section, values in flags.items():
        for key, value in values.items():
            before = getattr(saved[section], key)
            if key not in CHANGEABLE and value != before:
                raise ValueError(
                    f"{folder} was trained with {key} {before}, which cannot become {value}; "
                    f"when going on, only {', '.join(CHANGEABLE)} can change"
                )
    if saved["text"].val_text is None and flags["text"].get("val_text"):
        raise ValueError(
            f"{folder} is validated on the end of its own text, which cannot change; leave out "
            "--val_text"
        )
    _, optimizer_config, text_config, config = build(
        SECTIONS, {name: asdict(section) for name, section in saved.items()}, flags
    )
    step, evaluated = checkpoint.progress.step, checkpoint.progress.evaluated_step
    if config.minutes is None and config.max_steps <= step:
        raise ValueError(
            f"{folder} is at step {step:,} and max_steps is {config.max_steps:,}; "
            f"to go on, give a larger one, such as --max_steps {2 * step or 1}, or --minutes"
        )
    where = f"say where it is: python train.py TEXT --resume {shlex.quote(folder.as_posix())}"
    if text_config.val_text is not None:
        where += " --val_text OTHER"
    named = [] if paths else list(checkpoint.text["paths"])
    if text_config.val_text is not None and "val_text" not in flags["text"]:
        named.append(text_config.val_text)
    for path in named:
        # What a file from elsewhere names must not be a device, or a pipe that is waited for.
        if path == STANDARD_INPUT or (
            os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
        ):
            raise ValueError(f"the text of {folder} was {path!r}, which is no file; {where}")
    paths = paths or checkpoint.text["paths"]
    try:
        text = read_text(paths, text_config)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if the text has moved, {where}") from None
    if text.sha256 != checkpoint.text["sha256"]:
        before, now = checkpoint.text["characters"], text.n_characters
        differs = f"{now:,} characters instead of {before:,}"
        if now == before:
            differs = f"as many characters, {now:,}, but not the same ones"
        raise ValueError(
            f"this is not the text that {folder} was trained on, or it has changed since: it has "
            f"{differs}; if it has moved, {where}"
        )
    describe_text(text)
    run = assemble(folder, paths, text, checkpoint, optimizer_config, text_config, config)
    # Before the first step there is nothing to remember, and older versions saved nothing of it.
    if step:
        restore_optimizers(run.model, run.optimizers, checkpoint.optimizer)
    # Steps after the last save are made again, and so are their lines.
    if evaluated is not None:
        run.log = [line for line in read_log(folder) if line["step"] <= evaluated]
        run.seconds_before = run.log[-1]["seconds"] if run.log else 0.0
    run.max_steps_before = saved["train"].max_steps
    # Its best may be of a later step: when the disk had room for that, but not for the whole run.
    with contextlib.suppress(ValueError, OSError):
        best = load_checkpoint(folder / BEST)
        loss, before = best.progress.best_loss, run.progress.best_loss
        alike = (best.text["sha256"], best.model.config) == (text.sha256, run.model.config)
        if alike and best.progress.best_step and loss < (math.inf if before is None else before):
            run.progress.best_loss, run.progress.best_step = loss, best.progress.best_step
    if out_of_patience(run):
        raise ValueError(
            f"{folder} has stopped early, no better than at step {run.progress.best_step:,}; to go "
            f"on, give a larger --patience than {len(evaluations_since_best(run))}"
        )
    if run.progress.best_step and not (folder / BEST).exists():
        print(f"note     {folder / BEST} is missing; the next model that is evaluated becomes it")
    print(f"resumed  {folder} at step {step:,}")
    return run


def settings_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings, by section, of the run that a checkpoint was read from.

    One that the checkpoint lacks has its default; but `muon_nu` and `muon_weight_decay` are newer
    than some checkpoints, whose runs had Nesterov's momentum (1.0) and no weight decay in Muon.
    Raises ValueError for a setting that cannot be.
    """
    older = {"optimizer": {"muon_nu": 1.0, "muon_weight_decay": 0.0}}
    settings = checkpoint.settings | {"model": asdict(checkpoint.model.config)}
    try:
        return dict(zip(SECTIONS, build(SECTIONS, older, settings), strict=True))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {str(error)[:LONGEST_REASON]}") from None


def assemble(
    folder: Path,
    paths: list[str],
    text: Text,
    start: Checkpoint,
    optimizer_config: OptimizerConfig,
    text_config: TextConfig,
    config: TrainConfig,
) -> Run:
    """Bring model and text to the device, and say what will be trained there.

    The checkpoint to start from may lack text and settings, which are given besides.
    """
    model = start.model
    device, device_reason = choose_device(config.device)
    precision, precision_reason = choose_precision(config.dtype, device, model.config.n_embd)
    to_device(model, device)
    total, in_blocks = model.count_parameters()
    print(
        f"model    {total:,} parameters, {in_blocks:,} in the blocks; "
        f"it looks back {model.config.block_size} characters"
    )
    print(
        f"device   {device} ({device_reason}), "
        f"{str(precision).removeprefix('torch.')} ({precision_reason})"
    )
    ids = text.ids(start.vocabulary, copied=device.type != "cpu").to(device)
    return Run(
        folder,
        paths,
        text,
        start.vocabulary,
        model,
        start.average.to(device),
        optimizers_for(model, config, optimizer_config, precision),
        optimizer_config,
        text_config,
        config,
        precision,
        ids[: text.n_training],
        ids[text.n_training :],
        start.progress,
    )


def choose_preset(device: torch.device, n_training: int) -> tuple[str, str]:
    """Return the preset that suits a device and the characters to train on, and the reason."""
    # Below that, `tiny` was ahead of `mini` on four stretches of five, by 0.1 to 0.3 nats.
    if n_training < 20_000:
        return "tiny", "for so short a text, a larger model is worse"
    if device.type == "cpu":
        if n_training < 300_000:
            return "mini", "a short text, and a CPU learns it in a minute or two"
        return "small", "what a CPU trains well in a few minutes"
    if n_training < 300_000:
        return "medium", "a short text, which a larger model would learn by heart"
    return "base", "a GPU trains the largest in minutes"


def describe_text(text: Text) -> None:
    """Say what was read, how, and what was left out."""
    n_files = sum(len(part.files) for part in text.parts)
    n_binary = sum(part.n_binary for part in text.parts)
    unknown = [file for part in text.parts for file in part.unknown]
    files = "1 file" if n_files == 1 else f"{n_files} files"
    for_validation = ""
    if len(text.parts) > 1:
        n_validation = text.n_characters - text.n_training
        for_validation = f", the last {n_validation:,} of them to validate on"
    binary = f" ({n_binary} binary left out)" if n_binary else ""
    names = {"\r\n": "CR LF", "\r": "CR"}
    others = [names[line_end] for line_end in text.line_ends if line_end in names]
    turned = f", line ends {' and '.join(others)} turned into LF" if others else ""
    print(
        f"text     {text.name}, {files}{binary} in {' and '.join(text.encodings)}{turned}: "
        f"{text.n_characters:,} characters{for_validation}, {len(text.counts):,} different, "
        f"begins {next(text.blocks())[:60]!r}"
    )
    if unknown:
        left_out = "1 file is" if len(unknown) == 1 else f"{len(unknown)} files are"
        print(
            f"warning: {left_out} left out, being damaged or in an encoding that does not show, "
            f"such as {unknown[0]}: name it alone to see which it may be, then say --encoding"
        )


def optimizers_for(
    model: GPT, config: TrainConfig, optimizer_config: OptimizerConfig, precision: torch.dtype
) -> list[Optimizer]:
    """Return the optimizers that train a model: a Muon for each part of a batch.

    The parts' threads move the weights side by side, too: on two cores, that takes 0.93 to 0.98 of
    the time of a step of `mini`, `small` and `medium`.
    """
    n_parts, _ = divide_among_threads(config.batch_size, model.config, model.head.weight.device)
    return make_optimizers(model, optimizer_config, precision, n_parts)


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
        run.progress,
    )


def out_of_patience(run: Run) -> bool:
    """Tell whether the last `patience` evaluations brought no gain, so that the run stops."""
    patience = run.config.patience
    return patience is not None and len(evaluations_since_best(run)) >= patience


def evaluations_since_best(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the log after that of the best evaluation."""
    return [line for line in run.log if line["step"] > run.progress.best_step]
