"""Compare model sizes: python compare.py book.txt --presets tiny mini small --minutes 2"""

import contextlib
import datetime
import itertools
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

# Read when torch is loaded, and the same as in train.py, where it is explained.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")

import torch
from tqdm import tqdm

from checkpoint import (
    BEST,
    LAST,
    OUT,
    Checkpoint,
    find_run,
    load_checkpoint,
    lock_run,
    read_log,
    try_lock,
    write_whole,
)
from config import PRESETS, SettingsParser, Values, build, load_preset
from config.hardware import choose_device, ran_out_of_memory
from config.script import StopRequest, Unfailing, bad_input_exits, run_script
from data import Text, TextConfig, Vocabulary, baselines, fit_block_size, read_text
from measurement import Measured, Parts, explain, load_last, measure, summarize
from model import GPTConfig
from report import PLOTTING, Row, as_csv, as_page, as_table, comparison
from run import (
    CHANGEABLE,
    build_all_but_model,
    describe_text,
    refuse_two_validation_parts,
    settings_of,
)
from run import SECTIONS as RUN_SECTIONS
from training import EVALUATED_CHARACTERS

TRAIN = Path(__file__).with_name("train.py")
# The file in a run's folder with what train.py said.
SAID = "train.txt"
MINUTES = 1.0
# How often it is looked how far a run is.
LOOK_SECONDS = 0.2
# What measuring a run is to the progress bar, in runs.
MEASURING = 0.1
BAR = "{desc}|{bar}| {percentage:.0f}% {elapsed}"
OWN_ADVICE = "to compare anew, name another folder with --out"


@dataclass(frozen=True)
class BudgetConfig:
    """What each run is given instead of --minutes, and how many runs a preset has."""

    chars: Annotated[float | None, "characters to train on, instead of --minutes"] = None
    flops: Annotated[float | None, "floating-point operations to train for, instead"] = None
    seeds: Annotated[int, "runs of each preset, with --seed and those that follow it"] = 1

    def __post_init__(self):
        for name in ("chars", "flops"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} is {value:g}; it must be at least 1")
        if not 1 <= self.seeds <= 100:
            raise ValueError(f"seeds is {self.seeds}; it must be from 1 to 100")


SECTIONS = RUN_SECTIONS | {"budget": BudgetConfig}


@dataclass(frozen=True)
class Job:
    """One run that is to be there before it is measured."""

    name: str
    folder: Path
    # How far its model looks back.
    context: int
    # What train.py is called with to begin it and to go on with it; nothing if it is not trained.
    words_to_begin: tuple[str, ...] = ()
    words_to_go_on: tuple[str, ...] = ()
    # How long it takes, in one of two ways.
    seconds: float | None = None
    max_steps: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the command line says, and return the exit code."""
    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(bad_input_exits("compare.py"))
        arguments, flags = command_line().parse(argv)
        refuse_contradictions(flags)
        if arguments.presets is None:
            raise ValueError("it is not said what to compare; name some, as in --presets tiny mini")
        for preset in arguments.presets:
            refuse_unknown(preset)
        _, text_config, train_config, _ = build_all_but_model(SECTIONS, flags)
        device, _ = choose_device(train_config.device)
        text = read_text(arguments.texts, text_config)
        if any(isinstance(file, bytes) for part in text.parts for file, _ in part.files):
            raise ValueError("each run reads the text anew, so it must be a file, not a pipe")
        describe_text(text)
        vocabulary = Vocabulary.of_counts(text.counts, text_config.min_count)
        folder = Path(arguments.out or OUT / f"compare-{text.name}")
        refuse_folder_in_text(folder, [*arguments.texts, *filter(None, [text_config.val_text])])
        jobs: dict[str, list[Job]] = {}
        for preset in arguments.presets:
            if is_preset(preset):
                planned = plan(preset, folder, arguments.texts, text, vocabulary, flags)
            else:
                planned = [given_run(preset, text, vocabulary, text_config)]
            if jobs.setdefault(planned[0].name, planned) is not planned:
                raise ValueError(f"two presets are called {planned[0].name}; rename one of them")
        folder.mkdir(parents=True, exist_ok=True)
        until_the_end.enter_context(lock_run(folder))
        # What is said may get lost; what is trained must not.
        until_the_end.enter_context(contextlib.redirect_stdout(Unfailing(sys.stdout)))
        until_the_end.enter_context(contextlib.redirect_stderr(Unfailing(sys.stderr)))
        if text.held is None:
            text.ids(vocabulary)  # which are kept, or the first run would lose some of its time
        failures: dict[Job, str] = {}
        measured: dict[Job, Measured] = {}
        all_jobs = list(itertools.chain(*jobs.values()))
        announce(all_jobs)
        bar = tqdm(total=len(all_jobs) * (1 + MEASURING), disable=None, bar_format=BAR)
        until_the_end.enter_context(bar)
        stop = until_the_end.enter_context(StopRequest())
        for i, job in enumerate(all_jobs):
            bar.n = i
            if job.words_to_begin and (reason := train(job, bar, stop)):
                failures[job] = reason
                tqdm.write(f"{job.folder.name} failed: {reason}")
            if stop.made:
                print("stopped; the same command goes on from here", file=sys.stderr)
                return stop.exit_code
        done = [job for job in all_jobs if job not in failures]
        parts = Parts.of(text, vocabulary, device, max((job.context for job in done), default=1))
        for i, job in enumerate(done):
            bar.n = len(all_jobs) + MEASURING * i
            bar.set_description_str(f"measuring {job.folder.name} ")
            try:
                # While one was trained, its text may have changed.
                check_run(job.folder, text, vocabulary, {}, OWN_ADVICE)
                measured[job] = measure(job.name, job.folder, parts, device)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not ran_out_of_memory(error):
                    raise
                failures[job] = f"it could not be measured: {error}"
            if stop.made:
                print("stopped; the same command measures again", file=sys.stderr)
                return stop.exit_code
        bar.close()
        if not measured:
            reasons = "; ".join(f"{job.folder.name}: {why}" for job, why in failures.items())
            print(f"compare.py: no run has come to its end: {reasons}", file=sys.stderr)
            return 1
        facts = reproduction(sys.argv[1:] if argv is None else argv, text, device, all_jobs)
        show(folder, text.name, failures, measured, list(jobs), parts, vocabulary, facts)
    return 0


def announce(jobs: Sequence[Job]) -> None:
    """Say what is going to be trained."""
    new = [job for job in jobs if job.words_to_begin and not (job.folder / LAST).exists()]
    minutes = sum(job.seconds or 0 for job in new) / 60
    time_needed = f" for {minutes:g} minutes in all" if minutes else ""
    begun = f"; {len(jobs) - len(new)} begun or finished" if len(new) < len(jobs) else ""
    runs = "1 run" if len(new) == 1 else f"{len(new)} runs"
    print(f"plan     {runs} to train{time_needed}{begun}; then all are measured")


def command_line() -> SettingsParser:
    """Return the parser of what can be said on the command line."""
    about = (
        "Train presets on the same text under the same budget (a minute of training each, unless "
        "--minutes, --chars or --flops says otherwise), and compare them. All other settings but "
        "max_steps and patience are those of train.py and change every preset."
    )
    parser = SettingsParser("compare.py", "TEXT ...", about, SECTIONS)
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="text files and folders, as for train.py"
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        action="extend",
        metavar="PRESET",
        help="tiny, mini, small, medium, base, paths of .toml files, or run folders on the same "
        "text, which are only measured",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder for runs and page (default: out/compare-<text>)"
    )
    return parser


def refuse_contradictions(flags: Values) -> None:
    """Raise ValueError for what cannot be meant."""
    given = [*flags["train"], *flags["budget"]]
    budgets = [name for name in ("minutes", "chars", "flops") if name in given]
    if len(budgets) > 1:
        raise ValueError(f"--{' and --'.join(budgets)} each say how long to train; give one")
    refuse_two_validation_parts(flags)
    for name in ("max_steps", "patience"):
        if name in given:
            raise ValueError(
                f"--{name} would give presets different budgets; say --minutes, --chars or --flops"
            )


def refuse_unknown(preset: str) -> None:
    """Raise ValueError or FileNotFoundError for what is neither a preset nor a run."""
    if preset == "auto":
        raise ValueError(f"auto stands for one of the presets; name some of {', '.join(PRESETS)}")
    if is_preset(preset) or (len(Path(preset).parts) == 1 and not Path(preset).exists()):
        load_preset(preset, RUN_SECTIONS)  # it says what is wrong, and which there are
    elif Path(preset).is_file():
        raise ValueError(f"{preset} is a file; texts come before --presets, and runs are folders")
    else:
        find_run(preset)


def is_preset(word: str) -> bool:
    """Tell whether a word names a preset or its file, and not a run."""
    return word in PRESETS or word.endswith(".toml")


def refuse_folder_in_text(folder: Path, texts: Sequence[str]) -> None:
    """Raise ValueError if a folder lies in that of a text, of which it would become a part."""
    inside, out = folder.resolve(), OUT.resolve()
    for text in map(Path, texts):
        around = text.resolve()
        # What lies below out/ is no text, unless one is named there.
        apart = inside.is_relative_to(out) and not around.is_relative_to(out)
        if inside.is_relative_to(around) and not apart:
            raise ValueError(f"{folder} lies in the text {text}; name another folder with --out")


def plan(
    preset: str,
    folder: Path,
    texts: Sequence[str],
    text: Text,
    vocabulary: Vocabulary,
    flags: Values,
) -> list[Job]:
    """Return the runs of a preset, one for each seed.

    Raises ValueError if one of them is there already, but with other settings.
    """
    values = load_preset(preset, RUN_SECTIONS)
    model_config, optimizer_config, text_config, config, budget = build(SECTIONS, values, flags)
    if config.patience is not None:
        raise ValueError(f"{preset} sets patience, with which it may end before its budget does")
    if text_config != build_all_but_model(SECTIONS, flags)[1]:
        raise ValueError(f"{preset} has a section [text], but all are compared on the same text")
    n_validation = text.n_characters - text.n_training
    block_size = fit_block_size(text.n_training, n_validation, model_config.block_size)
    model_config = replace(model_config, block_size=block_size)
    given = {
        key: f"--{key}={value}"
        for section in RUN_SECTIONS
        for key, value in flags[section].items()
        if key not in ("seed", "minutes")
    }
    to_go_on = (*texts, *(word for key, word in given.items() if key in CHANGEABLE))
    to_begin, seconds, max_steps = [*texts, *given.values(), f"--preset={preset}"], None, None
    if budget.chars is None and budget.flops is None:
        minutes = flags["train"].get("minutes", MINUTES)
        seconds, length = 60 * minutes, f"{minutes:.15g}min"
        to_begin.append(f"--minutes={minutes}")
    else:
        if budget.flops is None:
            characters, length = budget.chars, f"{budget.chars:.15g}chars"
        else:
            characters = budget.flops / flops_per_character(model_config, len(vocabulary))
            length = f"{budget.flops:.15g}flops"
        max_steps = math.ceil(characters / (config.batch_size * block_size))
        to_begin.append(f"--max_steps={max_steps}")
        if config.eval_interval is None:
            # As rare as train.py would have them, but by arithmetic instead of by the clock:
            # evaluations, which need a third of a step's, are at most a tenth of the work.
            evaluated = min(n_validation, EVALUATED_CHARACTERS)
            evaluations = min(max(0.3 * characters / evaluated, 1), 10)
            to_begin.append(f"--eval_interval={math.ceil(max_steps / evaluations)}")
    jobs = []
    for seed in range(config.seed, config.seed + budget.seeds):
        run = folder / f"{Path(preset).stem}-{length}-seed{seed}"
        settings = {
            "model": model_config,
            "optimizer": optimizer_config,
            "text": text_config,
            "train": replace(config, seed=seed),
        }
        begin = (*to_begin, f"--seed={seed}", f"--out={run}")
        jobs.append(Job(Path(preset).stem, run, block_size, begin, to_go_on, seconds, max_steps))
        if (run / LAST).exists():
            saved = check_run(run, text, vocabulary, settings, OWN_ADVICE)
            steps = saved.settings["train"]["max_steps"]
            if max_steps not in (None, steps):
                raise ValueError(f"{run} has {steps:,} steps, not {max_steps:,}; {OWN_ADVICE}")
    return jobs


def given_run(path: str, text: Text, vocabulary: Vocabulary, text_config: TextConfig) -> Job:
    """Return the run in a folder, which is to be measured as it is."""
    run = Path(path)
    advice = "only runs on the same text and split can be compared"
    saved = check_run(run, text, vocabulary, {"text": text_config}, advice)
    if not (run / BEST).is_file() or load_checkpoint(run / BEST).progress.step == 0:
        raise ValueError(f"{path} holds a run that has not been evaluated yet")
    return Job(run.resolve().name, run, saved.model.config.block_size)


def check_run(
    run: Path, text: Text, vocabulary: Vocabulary, settings: Mapping[str, Any], advice: str
) -> Checkpoint:
    """Return what a run has saved; ValueError if its text or settings are others than these."""
    saved = load_last(run)
    if saved.text["sha256"] != text.sha256 or saved.vocabulary.characters != vocabulary.characters:
        raise ValueError(
            f"{run} was trained on another text than {text.name}, or that has changed since; "
            f"{advice}"
        )
    if not RUN_SECTIONS.keys() <= {"model", *saved.settings}:
        raise ValueError(f"{run} does not say how it was trained; {advice}")
    known = settings_of(run, saved)
    for section, config in settings.items():
        for key, value in asdict(config).items():
            before = getattr(known[section], key)
            if key not in CHANGEABLE and before != value:
                raise ValueError(f"{run} was trained with {key} {before}, not {value}; {advice}")
    return saved


def flops_per_character(config: GPTConfig, vocab_size: int) -> float:
    """Return the floating-point operations of training on one character.

    Those of the matrix products: 6 for each weight, 12 n_layer n_embd block_size in attention
    ("PaLM: Scaling Language Modeling with Pathways", Chowdhery et al., 2022, appendix B).
    """
    weights = config.n_layer * 12 * config.n_embd**2 + config.n_embd * vocab_size
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def train(job: Job, bar: tqdm, stop: StopRequest) -> str | None:
    """Let train.py make a run, or go on with it, and return why it failed, if it did.

    It runs in a process of its own, so that whatever happens to it, the others go on.
    """
    before = bar.n
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / SAID).open("ab") as file:
        # Locked by whoever writes there: if a comparison is killed, its last run may go on alone.
        bar.set_description_str(f"{job.folder.name}: waiting for another process ")
        while not try_lock(file.fileno()):
            time.sleep(LOOK_SECONDS)
            if stop.made:
                return None
        bar.set_description_str(f"{job.folder.name} ")
        words, share_before = job.words_to_begin, 0.0
        if (job.folder / LAST).exists():
            last = load_last(job.folder)
            share_before = last.progress.step / last.settings["train"]["max_steps"]
            words = (*job.words_to_go_on, f"--resume={job.folder}")
        if share_before >= 1:
            return None
        # Where the file ends now: another process may have written to it since it was opened.
        begins_at, began = os.fstat(file.fileno()).st_size, time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *words], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                if stop.made:
                    # Windows would end it at once; there, it is told of Ctrl-C as well.
                    if os.name == "posix":
                        process.terminate()
                    process.wait()
                time.sleep(LOOK_SECONDS)
                log = read_log(job.folder)
                if job.seconds is not None:
                    share = share_before + (time.perf_counter() - began) / job.seconds
                else:
                    share = log[-1]["step"] / job.max_steps if log else 0.0
                if log:
                    nats = log[-1]["validation_loss"]
                    bar.set_description_str(f"{job.folder.name}: {nats:.3f} nats ", refresh=False)
                bar.n = before + min(share, 1.0)
                bar.refresh()
        finally:
            process.kill()
            process.wait()
    if process.returncode == 0:
        log = read_log(job.folder)
        nats = min(line["validation_loss"] for line in log if line["step"])
        tqdm.write(f"{job.folder.name}: {nats:.3f} nats after {log[-1]['seconds']:.0f} s")
    if process.returncode == 0 or stop.made:
        return None
    said = (job.folder / SAID).read_bytes()[begins_at:].decode(errors="replace")
    reasons = re.findall("^train.py: (.*)", said, re.MULTILINE)
    if reasons:
        return reasons[-1].rstrip()  # on Windows, lines end in \r\n
    if process.returncode == -9:
        return "it was killed, probably because memory ran out"
    return f"it ended with exit code {process.returncode}; see {job.folder / SAID}"


def show(
    folder: Path,
    name: str,
    failures: Mapping[Job, str],
    measured: Mapping[Job, Measured],
    names: Sequence[str],
    parts: Parts,
    vocabulary: Vocabulary,
    facts: Mapping[str, str],
) -> None:
    """Print the table, and write it, the pictures and the page into a folder."""
    known = {row.name: row for row in summarize(list(measured.values()))}
    sentences = explain(list(known.values()), parts)
    rows = [known.setdefault(name, Row(name)) for name in names]
    for job, reason in failures.items():
        row = known[job.name]
        if row.seeds:
            row.failed_seeds += 1
            sentences.append(f"{job.folder.name} failed: {reason}")
        else:
            row.failure = reason
    simple = baselines(parts.training_ids, parts.validation_ids, vocabulary)
    print(f"\n{as_table(rows, simple)}\n\n" + "\n".join(sentences) + "\n")
    passage = vocabulary.decode(parts.validation_ids[parts.passage].tolist())
    # A file's name need not be UTF-8.
    write_whole(folder / "comparison.csv", as_csv(rows, simple).encode(errors="replace"))
    page = as_page(f"Model sizes compared on {name}", rows, simple, passage, sentences, facts)
    write_whole(folder / "report.html", page.encode(errors="replace"))
    print(
        f"page:            {folder / 'report.html'}\nnumbers:         {folder / 'comparison.csv'}"
    )
    if PLOTTING:
        finished = [row for row in rows if row.failure is None]
        try:
            picture = comparison(finished, simple)
        except Exception:
            # The page says why. What may be there is the picture of an earlier comparison.
            (folder / "losses.svg").unlink(missing_ok=True)
        else:
            write_whole(folder / "losses.svg", picture)
            print(f"picture:         {folder / 'losses.svg'}")
    else:
        print("note: pictures of the losses take one more package: pip install matplotlib")
    (best,) = (row.name for row in rows if row.best)
    run = next(job.folder for job in measured if job.name == best)
    print(f"write with it:   python sample.py {shlex.quote(run.as_posix())}")


def reproduction(
    words: Sequence[str], text: Text, device: torch.device, jobs: Sequence[Job]
) -> dict[str, str]:
    """Return what someone needs to know who wants the same numbers."""
    return {
        "command": f"python compare.py {shlex.join(words)}",
        "text": f"{text.name}: {text.n_characters:,} characters, {len(text.counts):,} different, "
        f"the last {text.n_characters - text.n_training:,} of them to validate on; "
        f"SHA-256 {text.sha256}",
        "runs": ", ".join(job.folder.as_posix() for job in jobs),
        "machine": f"{device}, {platform.system()} on {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    run_script(main)
