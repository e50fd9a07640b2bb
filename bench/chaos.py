"""Kill a training run again and again, and compare what comes out with a run left alone.

python bench/chaos.py book.txt 200    (text, kills; Unix)

Half of the kills wait for a file to be written. After each, every checkpoint has to load.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command_line import end_if_failed, parse, whole_number
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from checkpoint import BEST, LAST, LOG, load_checkpoint, read_log

# A run is saved whenever a twentieth of a second has gone by.
SETTINGS = ["--preset", "mini", "--dropout", "0.1", "--save_minutes", "0.001"]
LONGEST_LIFE = 1.5  # seconds after the plan is made


def start(words: list[str]) -> subprocess.Popen:
    """Start train.py and return when it is about to train."""
    command = [sys.executable, train.__file__, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    if not any(line.startswith("plan") for line in process.stdout):
        end_if_failed(process.wait())
        sys.exit("train.py did not start")
    return process


def finish(words: list[str]) -> None:
    """Let train.py run to its end."""
    process = start(words)
    process.communicate()
    end_if_failed(process.returncode)


def is_writing(run: Path) -> bool:
    """Tell whether a file is half-written."""
    return any((run / f"{name}.tmp").exists() for name in (BEST, LAST, LOG))


def main() -> None:
    """Train once undisturbed and once with kills, and print the comparison."""
    asked = parse(__doc__, text=str, kills=whole_number)
    text, kills = asked.text, asked.kills
    draw = random.Random(1)
    settings = [*SETTINGS, "--max_steps", str(20 * kills), "--eval_interval", "50"]
    during_a_write, loaded, seen = 0, 0, set()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        finish([text, *settings, "--out", str(whole)])
        for kill in tqdm(range(kills)):
            words = [text, *settings, "--out", str(killed)]
            if (killed / LAST).exists():
                words = ["--resume", str(killed)]
            process = start(words)
            time.sleep(draw.uniform(0, LONGEST_LIFE))
            if kill % 2:
                while process.poll() is None and not is_writing(killed):
                    pass
            process.kill()
            process.communicate()
            if process.returncode == 0:
                sys.exit(f"the run was finished before kill {kill + 1}; nothing is shown")
            during_a_write += is_writing(killed)
            # A run that is killed early has no checkpoint yet, but none ever disappears.
            seen |= {name for name in (BEST, LAST) if (killed / name).exists()}
            for name in seen:
                load_checkpoint(killed / name)
                loaded += 1
            steps = [line["step"] for line in read_log(killed)]
            if steps != list(range(0, 50 * len(steps), 50)):
                sys.exit(f"the log has the steps {steps}")
        reached = load_checkpoint(killed / LAST).progress.step
        finish(["--resume", str(killed)])
        logs = [[line | {"seconds": 0} for line in read_log(run)] for run in (whole, killed)]
        print(
            f"{kills} kills, {during_a_write} of them during a write; {loaded} checkpoints loaded"
        )
        print(f"killed until step {reached:,} of {20 * kills:,}")
        for name in (BEST, LAST):
            same = (whole / name).read_bytes() == (killed / name).read_bytes()
            print(f"{name}: {'the same bytes' if same else 'DIFFERENT'}")
        print(f"{LOG}: {'the same but for the times' if logs[0] == logs[1] else 'DIFFERENT'}")
        print(f"files: {sorted(path.name for path in killed.iterdir())}")


if __name__ == "__main__":
    main()
