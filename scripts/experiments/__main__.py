"""A table or figure of the paper: train what is missing, gather one CSV, draw the picture.

    python -m scripts.experiments table1 --quick               on built-in images, in minutes
    python -m scripts.experiments table1                       small scale, on CIFAR-10
    python -m scripts.experiments table1 --scale imagenet --data /path/to/imagenet

Every option of the training programs goes to all runs (--epochs 20, --workers 4, ...).  The same
command goes on after an interruption; runs that experiments have in common are trained once, also
by commands at the same time.
What it leaves is in OUT: runs/, NAME.csv and NAME.png.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

from filelock import FileLock, Timeout

from scripts.experiments import spec
from scripts.experiments.measures import MEASURES
from scripts.experiments.plots import draw
from scripts.experiments.table import write_table
from utils.run.command_line import Parser, command, positive
from utils.run.distributed import init_distributed
from utils.run.errors import UserError

LOCK = ".experiment.lock"  # not that of training, which is a process of its own


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", help=", ".join(spec.experiment_names()))
    parser.add_argument("--scale", choices=spec.SCALES, default="small")
    parser.add_argument("--quick", action="store_const", dest="scale", const="quick")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each, seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, help="default: scripts/out/SCALE")
    parser.add_argument("--redraw", action="store_true", help="of OUT/NAME.csv, nothing trained")
    arguments, options = parser.parse_known_args()
    out = (arguments.out or spec.ROOT / "scripts" / "out" / arguments.scale).absolute()
    table, picture = (out / f"{arguments.name}.{suffix}" for suffix in ("csv", "png"))
    if not arguments.redraw:
        measure(arguments, options, out, table)
    draw(arguments.name, table, picture)
    print(f"{table}\n{picture}")


def measure(arguments: argparse.Namespace, options: Sequence[str], out: Path, table: Path) -> None:
    """Train what is missing and write the CSV."""
    experiment = spec.read_experiment(arguments.name, arguments.scale)
    runs = spec.resolve_runs(experiment, arguments.scale, arguments.seeds, out / "runs", options)
    try:
        for folder in (out, *(run.folder for run in runs)):  # which others find and share
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): pass --out") from error
    train_missing(runs)
    with init_distributed() as dist:
        measured = MEASURES[experiment.measure](runs, experiment.settings, dist, table)
        published = ({"source": "published", **row} for row in experiment.published)
        write_table(table, [*measured, *published])


def train_missing(runs: Sequence[spec.Run]) -> None:
    """Train the runs that are not finished, last those that another command is training."""
    waiting = [run for run in runs if not run.is_finished()]
    print(f"{len(waiting)} of {len(runs)} runs to train", flush=True)
    while waiting:
        left = [run for run in waiting if not finish(run)]
        if left == waiting:  # the first of them is in use, because parents come first
            print(f"waiting for another command to train {left[0].folder}", flush=True)
            with FileLock(left[0].folder / LOCK):
                pass
        waiting = left


def finish(run: spec.Run) -> bool:
    """Train a run; False if another command is doing so, or its parent is not finished."""
    if run.parent and not run.parent.is_finished():
        return False
    try:
        with FileLock(run.folder / LOCK, blocking=False):
            if not run.is_finished():
                print(f"{run.name}, seed {run.seed}: {run.folder}", flush=True)
                train(run)
    except Timeout:
        return False
    return True


def train(run: spec.Run) -> None:
    """Train a run, or what is left of it, as a process of its own.

    Raises:
        UserError: it stopped; the message is its last line.
    """
    program = [spec.ROOT / "utils" / "launch.py", spec.ROOT / f"step{run.step}" / "train.py"]
    arguments = [sys.executable, *program, *run.arguments]
    process = subprocess.run(arguments, stdout=DEVNULL, stderr=PIPE, text=True)
    if process.returncode:
        *_, last_line = ["nothing on stderr", *process.stderr.strip().splitlines()]
        raise UserError(f"run {run.name!r} stopped: {last_line.removeprefix('error: ')}")


if __name__ == "__main__":
    main()
