"""Train a character-level GPT on a text: python train.py book.txt"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# How often a thread looks whether the others are done before it sleeps. GNU's OpenMP, which torch
# has on Linux, reads it when it is loaded; by default it is 300,000, and then a step of `small`
# takes 1.4 times as long beside two busy programs, and at worst four times.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The same for LLVM's and Intel's, in milliseconds. By default it is 200, and then a step of four
# layers 64 wide takes 1.25 times as long: threads that only wait hold up those that compute.
os.environ.setdefault("KMP_BLOCKTIME", "1")

import torch
from tqdm import tqdm

from checkpoint import BEST, CURVE, LAST, Progress, find_run, lock_run, write_log, write_whole
from config import TOO_LARGE, SettingsParser
from config.hardware import peak_memory, ran_out_of_memory
from config.script import (
    StopRequest,
    Unfailing,
    bad_input_exits,
    describe_os_error,
    harmless,
    run_script,
)
from data import CATALOGUE, STANDARD_INPUT, baselines, evenly_spaced, survey
from graphs import CALLS_BEFORE_RECORDING
from model import SamplingConfig
from optimizer import schedule
from report import PLOTTING, curve
from run import (
    SECTIONS,
    Run,
    TrainConfig,
    begin,
    evaluations_since_best,
    optimizers_for,
    out_of_patience,
    refuse_to_overwrite,
    refuse_two_validation_parts,
    resume,
    step_function,
)
from training import EVALUATED_CHARACTERS, bits_per_byte, evaluate, nats_and_bits

SAMPLE_LENGTH = 200
# The picture of a run takes a tenth of a second, and so it is renewed no more often than this.
DRAWING_SECONDS = 2.0
# With as many steps before them, max_steps is still a valid setting.
MOST_STEPS = TOO_LARGE // 2
# A text that is read more often has no secrets left, even with dropout.
BY_HEART = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model as the command line says, and return the exit code."""
    started = time.perf_counter()
    with contextlib.ExitStack() as until_the_end:
        with bad_input_exits("train.py"):
            arguments, flags = command_line().parse(argv)
            if {"max_steps", "minutes"} <= flags["train"].keys():
                raise ValueError("--max_steps and --minutes both say how long to train; give one")
            refuse_two_validation_parts(flags)
            if arguments.resume is None:
                run = begin(arguments, flags)
            else:
                folder = folder_to_resume(arguments)
                until_the_end.enter_context(lock_run(folder))
                run = resume(folder, arguments.texts, flags)
            # A preset may have minutes.
            if "max_steps" in flags["train"]:
                run.config = replace(run.config, minutes=None)
            minutes = run.config.minutes
            deadline = None if minutes is None else started + 60 * minutes
            ready_after = time.perf_counter() - started
            pace = rehearse(run, thoroughly=arguments.dry_run)
            run.config = plan(run, pace, deadline)
            if arguments.dry_run:
                foretell(run, pace, ready_after)
                return 0
            if arguments.resume is None:
                run.folder.mkdir(parents=True, exist_ok=True)
                until_the_end.enter_context(lock_run(run.folder))
                refuse_to_overwrite(run.folder)
            else:
                # The log ends at the last evaluation; the steps since then took time, too.
                logged = run.log[-1]["step"] if run.log else 0
                seconds_per_step = run.seconds_before / logged if logged else pace.step
                run.seconds_before += (run.progress.step - logged) * seconds_per_step
                write_log(run.folder, run.log)
            # A folder that cannot be written is found out now, and not after an hour; and what the
            # command line changed holds, even if the run is killed before its next save.
            run.save_last()
        # What training says may get lost; what it has learned must not.
        until_the_end.enter_context(contextlib.redirect_stdout(Unfailing(sys.stdout)))
        until_the_end.enter_context(contextlib.redirect_stderr(Unfailing(sys.stderr)))
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
        help=f"text files and folders, - for standard input, or {', '.join(CATALOGUE)}, which are "
        "fetched; without any, the source of Python's own library",
    )
    parser.add_argument(
        "--preset",
        help="tiny, mini, small, medium, base, the path of a .toml file, or auto (the default), "
        "which chooses by device and length of text, and reads a short one at most 30 times "
        "(but takes at least 200 steps)",
    )
    parser.add_argument("--out", metavar="RUN", help="run folder (default: out/<text>-<preset>)")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="look at the text, time a few steps, say what to expect, and train nothing",
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    return parser


def folder_to_resume(arguments: argparse.Namespace) -> Path:
    """Return the folder of the run that the command line wants to go on with."""
    if arguments.preset is not None or arguments.out is not None:
        raise ValueError("--resume goes on with a run as it is; leave out --preset and --out")
    run = find_run(arguments.resume)
    if run.is_file() and run.name not in (BEST, LAST):
        raise ValueError(f"{run} is no run; --resume takes the folder of one")
    return run.parent if run.is_file() else run


@dataclass
class Pace:
    """How long a step and an evaluation take, in seconds; corrected as the run goes."""

    step: float
    evaluation: float

    def steps_until(self, deadline: float, eval_interval: int) -> int:
        """Return how many steps, with their evaluations and one at the end, fit before a time.

        It is 0 if that time is near or past.
        """
        left = min(deadline - time.perf_counter(), MOST_STEPS * self.step)
        times, rest = divmod(left, eval_interval * self.step + self.evaluation)
        steps = times * eval_interval + max(0.0, rest - self.evaluation) / self.step
        return max(0, int(steps))

    def duration(self, steps: int, eval_interval: float) -> float:
        """Return how long steps take, with their evaluations, at step 0 and at the end included."""
        return steps * (self.step + self.evaluation / eval_interval) + self.evaluation

    def eval_interval(self, steps: int) -> int:
        """Return the steps between evaluations: at most ten, in about a tenth of the time."""
        evaluations = min(max(0.1 * steps * self.step / self.evaluation, 1), 10)
        return math.ceil(steps / evaluations)


def rehearse(run: Run, thoroughly: bool) -> Pace:
    """Time training steps on a copy of the model, which is then thrown away."""
    model, average = copy.deepcopy(run.model), copy.deepcopy(run.average)
    optimizers = optimizers_for(model, run.config, run.optimizer_config, run.precision)
    # Two models need more memory than one, so what does not fit here may still fit later.
    progress = replace(run.progress)
    take_step = step_function(
        replace(run, model=model, average=average, optimizers=optimizers, progress=progress)
    )

    def seconds_of_a_step() -> float:
        began = time.perf_counter()
        take_step(0, 1).item()
        return time.perf_counter() - began

    step = seconds_of_a_step()
    if run.training_ids.is_cuda:
        # The first one loads kernels: on an H100, that took 2 s for `base`, whose steps take 7 ms.
        step = seconds_of_a_step()
    # A later one is recorded: where steps are fast, those after it tell more.
    if step < 1 or thoroughly:
        for _ in range(CALLS_BEFORE_RECORDING):
            seconds_of_a_step()
        step = statistics.median(seconds_of_a_step() for _ in range(20 if thoroughly else 3))
    n_evaluated = min(len(run.validation_ids), EVALUATED_CHARACTERS)
    # The forward pass is a third of a step's arithmetic.
    evaluation = step / 3 / characters_in_step(run) * n_evaluated
    if thoroughly:
        began = time.perf_counter()
        evaluate(run.average, run.validation_ids, run.precision)
        write_sample(run)
        evaluation = time.perf_counter() - began
    return Pace(step, evaluation)


def characters_in_step(run: Run) -> int:
    """Return how many characters a step reads."""
    return run.config.batch_size * run.model.config.block_size


def plan(run: Run, pace: Pace, deadline: float | None) -> TrainConfig:
    """Fix how many steps there will be and when to evaluate, and say what to expect."""
    config, progress, start = run.config, run.progress, run.progress.step
    steps = config.max_steps - start
    if deadline is not None:
        if progress.evaluated_step is None:
            deadline -= pace.evaluation  # that of step 0
        # At first with one evaluation: how many there are depends on the number of steps.
        steps = max(1, pace.steps_until(deadline, eval_interval=MOST_STEPS))
    interval = config.eval_interval or pace.eval_interval(steps)
    about = ""
    if deadline is not None:
        about, steps = "about ", max(1, pace.steps_until(deadline, interval))
    elif progress.eval_interval and config.max_steps == run.max_steps_before:
        # What goes on as it was planned is evaluated as it was planned, too.
        interval = config.eval_interval or progress.eval_interval
    progress.eval_interval = interval
    times = steps * characters_in_step(run) / len(run.training_ids)
    print(
        f"plan     {about}{steps:,} steps of {config.batch_size} x {run.model.config.block_size} "
        f"characters, reading the training text {times:{',.0f' if times >= 10 else '.2g'}} times "
        f"in about {readable_time(pace.duration(steps, interval))}"
    )
    if times > BY_HEART:
        print(
            f"warning: a text that is read so often is learned by heart; {BEST} keeps the step at "
            "which the validation part was known best"
        )
    if len(run.validation_ids) - 1 > EVALUATED_CHARACTERS:
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
    return replace(config, max_steps=now, minutes=None)


def foretell(run: Run, pace: Pace, ready_after: float) -> None:
    """Say what training would take, what is strange about the text and what it is worth to models.

    It took `ready_after` seconds to get ready for training.
    """
    began = time.perf_counter()
    said = describe_baselines(run)
    ends_in = time.perf_counter() - began
    training = pace.duration(run.config.max_steps - run.progress.step, run.progress.eval_interval)
    print(
        f"time     about {readable_time(ready_after + training + ends_in)} in all: "
        f"{readable_time(ready_after)} to begin, {readable_time(training)} of training, "
        f"{readable_time(ends_in)} to compare it with simpler models"
    )
    # What a few steps, an evaluation, a sample and the end of a run need is what all of it needs.
    print(f"memory   {peak_memory(run.training_ids.device)}")
    print(f"{survey(run.text.counts, run.text.blocks())}\n{said}")
    print("nothing was trained; leave out --dry_run to begin")


def write_sample(run: Run) -> str:
    """Return a short text from the same prompt and the same seed each time."""
    device = run.training_ids.device
    prompt = run.vocabulary.encode(run.vocabulary.start)[None].to(device).long()
    generator = torch.Generator(device).manual_seed(run.config.seed)
    stream = run.average.generate(
        prompt, SamplingConfig(), [generator], unwritten=run.vocabulary.unwritten
    )
    with contextlib.closing(stream):
        return run.vocabulary.decode(int(i) for i in itertools.islice(stream, SAMPLE_LENGTH))


def train(run: Run, pace: Pace, deadline: float | None) -> int:
    """Train until max_steps, an early stop or a signal, and return the exit code.

    With a deadline, max_steps is corrected by the speed so far. Raises
    FloatingPointError as soon as a loss, a gradient or a weight is seen not to be finite.
    """
    progress, start, evaluating = run.progress, run.progress.step, 0.0
    began = saved_at = drawn_at = time.perf_counter()
    take_step = step_function(run)
    loss_sum = torch.tensor(progress.loss_sum, device=run.training_ids.device)
    bar = tqdm(
        total=run.config.max_steps,
        initial=start,
        unit="char",
        unit_scale=characters_in_step(run),
        disable=None,
    )
    with bar, StopRequest() as stop:
        for step in itertools.count(start):
            progress.step, interval = step, progress.eval_interval
            # Where the interval has just grown, its next multiple may be too near.
            evaluated = progress.evaluated_step
            due = step % interval == 0 and (evaluated is None or step - evaluated >= interval / 4)
            if deadline is not None and step > start:
                training = time.perf_counter() - began - evaluating
                correct_plan(run, pace, deadline, step - start, training, due)
                bar.total = run.config.max_steps
            at_end = step == run.config.max_steps
            if (due or at_end) and step != evaluated:
                progress.loss_sum = finite(loss_sum.item())
                evaluation_began = time.perf_counter()
                validation_loss = evaluate(run.average, run.validation_ids, run.precision)
                record(run, finite(validation_loss), evaluation_began - began)
                loss_sum.zero_()
                now = saved_at = time.perf_counter()
                pace.evaluation = now - evaluation_began
                if now > drawn_at + DRAWING_SECONDS:
                    draw_curve(run)
                    drawn_at = time.perf_counter()
                evaluating += time.perf_counter() - evaluation_began
            if at_end or stop.made or out_of_patience(run):
                break
            if time.perf_counter() > saved_at + 60 * run.config.save_minutes:
                progress.loss_sum = finite(loss_sum.item())
                keep(run)
                saved_at = time.perf_counter()
            loss = take_step(step, run.config.max_steps)
            loss_sum += loss
            progress.loss_count += 1
            # Looking at a number makes Python wait for a GPU, so there it is done when the
            # bar is drawn, or else at the next evaluation or save.
            shown = bar.update()
            if shown or loss.device.type == "cpu":
                finite(loss.item())
            if shown:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if run.saved_step != progress.step:
            progress.loss_sum = finite(loss_sum.item())
            keep(run)
    return farewell(run, stop, start, time.perf_counter() - began)


def correct_plan(
    run: Run, pace: Pace, deadline: float, taken: int, training: float, due: bool
) -> None:
    """Fix anew how many steps there will be, from the seconds that `taken` of them took.

    That is done before an evaluation that is due, after 8, 16, 32, ... steps, and when time is left
    at the end: the rehearsal may have been slow by chance, and then evaluations become rarer, too.
    """
    step, config = run.progress.step, run.config
    at_end, interval = step == config.max_steps, run.progress.eval_interval
    unused = deadline - pace.evaluation - time.perf_counter()
    time_left = at_end and unused > 0.1 * training
    power_of_two = taken >= 8 and taken.bit_count() == 1
    if not (time_left or power_of_two or (due and not at_end)):
        return
    pace.step = training / taken
    steps = pace.steps_until(deadline - (pace.evaluation if due else 0.0), interval)
    if (time_left or power_of_two) and config.eval_interval is None:
        run.progress.eval_interval = max(interval, pace.eval_interval(steps))
    run.config = replace(config, max_steps=step + steps)


def finite(loss: float) -> float:
    """Return a loss that is a finite number; any other is a FloatingPointError."""
    if not math.isfinite(loss):
        raise FloatingPointError
    return loss


def record(run: Run, validation_loss: float, seconds: float) -> None:
    """Log an evaluation, save the run, and show how it is going."""
    progress, step = run.progress, run.progress.step
    training_loss = progress.loss_sum / progress.loss_count if progress.loss_count else None
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
    # Any model takes the place of a best that was not trained at all, which may be lucky on a short
    # validation part, or whose file is missing, as when only last.safetensors was brought along.
    lost = run.unsaved_best is None and not (run.folder / BEST).exists()
    if lost or progress.best_step == 0 or validation_loss < progress.best_loss:
        run.note_best(validation_loss)
    keep(run)
    trained = "" if training_loss is None else f"training {training_loss:.4f}, "
    tqdm.write(
        f"\nstep {step:,} of {run.config.max_steps:,}: {trained}"
        f"validation {nats_and_bits(validation_loss)}; "
        f"{describe_best(progress)}"
    )
    # That is said once: when the newest line is the only sign.
    if signs_of_overfitting(run) == run.log[-1:]:
        advice = "" if run.config.patience else ", Ctrl-C stops, --patience 3 stops by itself"
        tqdm.write(
            f"overfitting since step {progress.best_step:,}: validation has risen while training "
            f"fell; {BEST} keeps that step{advice}"
        )
    tqdm.write("\n".join(f"    {harmless(row)}".rstrip() for row in sample.splitlines()))


def keep(run: Run) -> None:
    """Write the log, the best model if it is new, and the run to go on with.

    The order matters when the machine stops in between: what the log or the best has too much
    comes again when the run resumes, but what they lack would be missing for ever. A disk that
    refuses gets a warning, and the next save tries again.
    """
    step = run.progress.step
    try:
        run.folder.mkdir(parents=True, exist_ok=True)  # it may have been moved
        write_log(run.folder, run.log)
        run.save_best()
        run.save_last()
    except OSError as error:
        tqdm.write(
            f"\ncould not save step {step:,}: {describe_os_error(error)}; {LAST} is still that of "
            f"step {run.saved_step:,}, and the next save tries again",
            file=sys.stderr,
        )


def draw_curve(run: Run) -> None:
    """Renew the picture of the run's losses, where the package that draws it is installed."""
    if PLOTTING and len(run.log) > 1:
        # Nothing depends on it: neither a full disk nor a broken package may end the run.
        with contextlib.suppress(Exception):
            write_whole(run.folder / CURVE, curve(run.log))


def signs_of_overfitting(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the log that show overfitting.

    They are no better than the best in validation, but better in training. The first line after
    the best is left out, because one may be chance.
    """
    losses = {line["step"]: line["training_loss"] for line in run.log}
    if (at_best := losses.get(run.progress.best_step)) is None:
        return []
    return [x for x in evaluations_since_best(run)[1:] if x["training_loss"] < at_best]


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
    elif ran_out_of_memory(error):
        sentence = (
            f"at step {step:,} memory ran out; other programs may be using it: free some, and go "
            f"on with {command_to_resume(run)}"
        )
    else:
        raise error
    return f"{sentence}; {run.folder / LAST} keeps step {run.saved_step:,}"


def farewell(run: Run, stop: StopRequest, start: int, seconds: float) -> int:
    """Say what came out and how to use it and go on with it; return the exit code.

    The run, or this part of it, began at step `start` and has taken `seconds`.
    """
    progress, folder = run.progress, shlex.quote(run.folder.as_posix())
    step, max_steps = progress.step, run.config.max_steps
    if run.saved_step != step:
        best_is_saved = run.unsaved_best is None and progress.best_step > run.saved_step
        but = f", but {BEST} has step {progress.best_step:,}" if best_is_saved else ""
        print(
            f"\ntrain.py: step {step:,} could not be saved, so what came after step "
            f"{run.saved_step:,} is lost{but}; mend that, then go on with {command_to_resume(run)}",
            file=sys.stderr,
        )
        return 1
    patience = f" --patience {2 * run.config.patience}" if out_of_patience(run) else ""
    at_end = step == max_steps
    stopped = not at_end and not patience
    more = f" --max_steps {2 * step}{patience}" if at_end else patience
    if stopped:
        print(f"\nstopped and saved at step {step:,} of {max_steps:,}")
    elif not at_end:
        print(f"\nstopped early at step {step:,}: no gain since step {progress.best_step:,}")
    where = f": {run.folder / BEST}" if (run.folder / BEST).exists() else ""
    if progress.best_step == 0 < step:
        where = f", and not measured since; {run.folder / LAST} has step {step:,}"
    print(f"\nvalidation loss: {describe_best(progress)}{where}")
    since = f" since step {start:,}" if start else ""
    characters = (step - start) * characters_in_step(run)
    print(f"read{since}: {characters:,} characters in {readable_time(seconds)}")
    if not stopped:
        # The run is saved; what it is compared with must not end it, nor who does not wait for it.
        with contextlib.suppress(MemoryError, KeyboardInterrupt):
            print(describe_baselines(run))
    draw_curve(run)
    if (run.folder / CURVE).exists():
        print(f"picture of it:  {run.folder / CURVE}")
    elif not PLOTTING:
        print(f"note: {CURVE}, a picture of it, takes one more package: pip install matplotlib")
    print(f"write with it:  python sample.py {folder}")
    if not stopped and signs_of_overfitting(run):
        print(
            f"more steps will hardly help, as it overfits since step {progress.best_step:,}; more "
            "text, more dropout or a smaller preset may"
        )
    else:
        print(f"go on with it:  {command_to_resume(run)}{more}")
    return stop.exit_code if stopped else 0


def command_to_resume(run: Run) -> str:
    """Return the command that goes on with a run; what came by a pipe has to come again."""
    words = ["python", "train.py", "--resume", run.folder.as_posix()]
    if STANDARD_INPUT in run.paths:
        words[2:2] = run.paths
    if run.text_config.val_text == STANDARD_INPUT:
        words += ["--val_text", STANDARD_INPUT]
    return ("... | " if STANDARD_INPUT in words else "") + shlex.join(words)


def describe_baselines(run: Run) -> str:
    """Say what simpler models make of the validation part, and how far below them this one is."""
    ids = evenly_spaced(run.validation_ids, EVALUATED_CHARACTERS)
    bits = baselines(run.training_ids, ids, run.vocabulary)
    others = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
    said = f"bits per character, the fewer the better: {others}"
    if run.progress.best_loss is None:
        return said
    own = run.progress.best_loss / math.log(2)
    # Of a short text, a trigram has seen too little.
    best_count = min(("unigram", "bigram", "trigram"), key=bits.__getitem__)
    # A text of one character costs either nothing.
    below = [
        f"{abs(1 - own / bits[name]):.0%} {'below' if own < bits[name] else 'above'} {name}"
        for name in (best_count, "xz")
        if bits[name] > 0
    ]
    said += f"; this model {own:.3f}" + (", " + " and ".join(below) if below else "")
    # The unknown character stands for others, of any number of bytes.
    if run.vocabulary.unwritten:
        return said
    per_byte = bits_per_byte(run.progress.best_loss, run.vocabulary.decode(ids[1:].tolist()))
    return f"{said}\nbits per byte, to compare languages: {per_byte:.3f}"


def describe_best(progress: Progress) -> str:
    """Say how good the best model is that was saved."""
    if progress.best_loss is None:
        return "no best yet"
    return f"best {nats_and_bits(progress.best_loss)} at step {progress.best_step:,}"


def readable_time(seconds: float) -> str:
    """Write a time for people: 45 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    run_script(main)
