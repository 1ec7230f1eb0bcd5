"""Tables and figures of the paper: train what is missing, gather one CSV each, draw the pictures.

    python -m scripts.experiments table1 --quick               on built-in images, in minutes
    python -m scripts.experiments table1                       small scale, on CIFAR-10
    python -m scripts.experiments table1 table4 fig7 --scale cifar10 --seeds 5 --jobs 2
    python -m scripts.experiments table1 --scale imagenet --data /path/to/imagenet

Every option of the training programs that no run sets itself goes to all runs (--epochs 20,
--workers 4, ...).  The same command goes on after an interruption; runs that experiments have in
common are trained once, also by commands at the same time.  Of several names all first seeds come
first, then the second ones.
On one GPU, small networks train faster together: --jobs 16, with NVIDIA's MPS started before.
A run that stops does not stop the others: the CSVs lack it, and the command ends with code 2.
What it leaves is in OUT: runs/, NAME.csv and NAME.png.
"""

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from scripts.experiments import spec
from scripts.experiments.measures import MEASURES
from scripts.experiments.plots import draw
from scripts.experiments.table import write_table
from scripts.experiments.workers import Worker
from utils.precision import set_precision
from utils.run.command_line import Parser, command, positive
from utils.run.config import parse_config
from utils.run.distributed import init_distributed
from utils.run.errors import UserError

LOCK = ".experiment.lock"  # not that of training, which is a process of its own
POLL_SECONDS = 0.5
PROGRESS_SECONDS = 300


@command
def main() -> None:
    parser = Parser(__doc__)
    names = ", ".join(spec.experiment_names())
    parser.add_argument("names", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--scale", choices=spec.SCALES, default="small")
    parser.add_argument("--quick", action="store_const", dest="scale", const="quick")
    parser.add_argument(
        "--seeds", type=positive, default=1, help="seeds of each run, or as many as its YAML allows"
    )
    parser.add_argument("--first_seed", type=int, default=0, help="for a scan, with its own --out")
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time, one core each; they share GPUs"
    )
    parser.add_argument("--out", type=Path, help="default: scripts/out/SCALE")
    parser.add_argument("--finished", action="store_true", help="only measure what is trained")
    parser.add_argument("--redraw", action="store_true", help="draw OUT/NAME.csv, nothing else")
    arguments, options = parser.parse_known_args()
    parse_config(spec.ROOT / "step2" / "config.yaml", options)  # also where nothing is trained
    out = (arguments.out or spec.ROOT / "scripts" / "out" / arguments.scale).absolute()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    problems = []
    runs: dict[str, list[spec.Run]] = {}
    if not arguments.redraw:
        for name in arguments.names:
            runs[name] = resolve(name, arguments.scale, seeds, out, options)
        if not arguments.finished:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            once = {run.folder: run for of_experiment in runs.values() for run in of_experiment}
            by_seed = sorted(once.values(), key=lambda run: run.seed)
            problems = train_missing(by_seed, arguments.jobs)
    for name in arguments.names:
        table, picture = (out / f"{name}.{suffix}" for suffix in ("csv", "png"))
        try:
            if not arguments.redraw:
                measure(name, arguments.scale, runs[name], table)
            print(draw(name, table, picture))
            print(f"{table}\n{picture}")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def resolve(
    name: str, scale: str, seeds: Sequence[int], out: Path, options: Sequence[str]
) -> list[spec.Run]:
    """The experiment's runs, with their folders."""
    experiment = spec.read_experiment(name, scale)
    runs = spec.resolve_runs(experiment, scale, seeds, out / "runs", options)
    try:
        for folder in (out, *(run.folder for run in runs)):  # which others find and share
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): pass --out") from error
    return runs


def measure(name: str, scale: str, runs: Sequence[spec.Run], table: Path) -> None:
    """Write the CSV of the runs that are finished.

    Raises:
        UserError: none is.
    """
    experiment = spec.read_experiment(name, scale)
    finished = [run for run in runs if run.is_finished()]
    if runs and not finished:
        raise UserError(f"no run of {name} is finished")
    set_precision("float32")
    with init_distributed(finished[0].config.device if finished else "auto") as dist:
        measured = MEASURES[experiment.measure](finished, experiment.settings, dist, table)
        published = ({"source": "published", **row} for row in experiment.published)
        write_table(table, [*measured, *published])


def train_missing(runs: Sequence[spec.Run], jobs: int = 1) -> list[str]:
    """Train the runs that are not finished, `jobs` at a time, each after its parents.

    A run that another command is training is left to it.  Whatever ends this function ends the
    trainings as well, which save where they are.

    Returns:
        A sentence for each run that stopped.
    """
    waiting = [run for run in runs if not run.is_finished()]
    print(f"{len(waiting)} of {len(runs)} runs to train", flush=True)
    workers = [Worker(number, jobs) for number in range(jobs)]
    problems: list[str] = []
    waiting_for, reported = None, time.monotonic()
    try:
        while waiting or any(worker.run for worker in workers):
            for worker in workers:
                if worker.run and worker.has_ended():
                    run = worker.run
                    if problem := worker.result():
                        problems.append(problem)
                        waiting = [other for other in waiting if not other.descends_from(run)]
                if not worker.run:
                    start_next(waiting, worker)
            if waiting and not any(worker.run for worker in workers) and waiting_for != waiting[0]:
                waiting_for = waiting[0]
                print(f"waiting for another command to train {waiting_for.folder}", flush=True)
            time.sleep(POLL_SECONDS)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                print(progress(runs, jobs), flush=True)
    finally:
        for worker in workers:
            worker.interrupt()
        for worker in workers:
            worker.close()
    return problems


def start_next(waiting: list[spec.Run], worker: Worker) -> None:
    """Take the first run out of `waiting` that can be trained now, and start it."""
    for run in list(waiting):
        lock = FileLock(run.folder / LOCK, blocking=False)
        if all(parent.is_finished() for parent in run.parents):
            with contextlib.suppress(Timeout):
                lock.acquire()
                waiting.remove(run)
                if not run.is_finished():
                    return worker.start(run, lock)
                lock.release()


def progress(runs: Sequence[spec.Run], jobs: int) -> str:
    """What is done, and the hours that the rest takes at the mean speed of the epochs recorded."""
    records = [record for run in runs for record in run.records()]
    finished = sum(run.is_finished() for run in runs)
    epochs = sum(run.config.epochs for run in runs)
    done = f"{finished} of {len(runs)} runs, {len(records):,} of {epochs:,} epochs"
    if not records:
        return f"{done}, time left not known yet"
    seconds = sum(
        record[f"{part}_images"] / record[f"{part}_images_per_second"]
        for record in records
        for part in ("train", "val")
    )
    hours = seconds / len(records) * (epochs - len(records)) / jobs / 3600
    return f"{done}, {hours:.1f} h left"


if __name__ == "__main__":
    main()
