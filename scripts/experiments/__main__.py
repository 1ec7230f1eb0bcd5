"""A table or figure of the paper: train what is missing, gather one CSV, draw the picture.

    python scripts/run_experiment.py table1 --quick               on built-in images, in minutes
    python scripts/run_experiment.py table1                       small scale, on CIFAR-10
    python scripts/run_experiment.py table1 --scale imagenet --data /path/to/imagenet

Every option of the training programs goes to all runs (--epochs 20, --workers 4, ...).  The same
command goes on after an interruption; runs that experiments have in common are trained once.
What it leaves is in OUT: runs/, NAME.csv and NAME.png.
"""

import argparse
import csv
import io
import itertools
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.checkpoints import LoadedNetwork, load_network
from models.teacher import load_teacher
from utils import measures, surface, two_nodes
from utils.checkpoint.checkpoint import NEWEST, kept
from utils.run.command_line import Parser, command, positive
from utils.run.config import Config
from utils.data import SeededDataset, open_images, open_val_images, train_loader
from utils.run.distributed import DistEnv, init_distributed
from utils.engine import train_one_epoch, validate
from utils.run.errors import UserError
from scripts.experiments.spec import (
    ROOT,
    Experiment,
    Run,
    experiment_names,
    read_experiment,
    resolve_runs,
    scale_names,
)
from utils.checkpoint.files import atomic_write
from utils.optim import build_optimizer, learning_rate, set_learning_rate

ACTIVATION_LIMIT = 3.0
RECALIBRATION_IMAGES = 1000

Row = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor]


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__)
    parser.add_argument("name", help=", ".join(experiment_names()))
    parser.add_argument("--scale", choices=scale_names(), default="small")
    parser.add_argument("--quick", action="store_const", dest="scale", const="quick")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each, seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, help="default: scripts/out/SCALE")
    return parser.parse_known_args()


@command
def main() -> None:
    arguments, options = parse()
    out = (arguments.out or ROOT / "scripts" / "out" / arguments.scale).absolute()
    experiment = read_experiment(arguments.name, arguments.scale)
    runs = resolve_runs(experiment, arguments.scale, arguments.seeds, out / "runs", options)
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): pass --out") from error
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}, seed {run.seed}: {run.folder}", flush=True)
        train_if_missing(run)
    table = out / f"{experiment.name}.csv"
    with init_distributed() as process:
        measured = MEASURES[experiment.measure](experiment, runs, table, process)
        published = ({"source": "published", **row} for row in experiment.published)
        write_csv(table, itertools.chain(measured, published))
    picture = table.with_suffix(".png")
    plot = [sys.executable, str(ROOT / "scripts" / "plot_experiment.py")]
    drawn = subprocess.run([*plot, experiment.name, str(table), "--picture", str(picture)])
    if drawn.returncode:
        sys.exit(drawn.returncode)
    print(f"{table}\n{picture}")


def train_if_missing(run: Run) -> None:
    """Train a run, or what is left of it.

    Raises:
        UserError: the training stopped; says what it said.
    """
    if run.is_finished():
        return
    launch = [sys.executable, str(ROOT / "utils" / "launch.py"), str(run.program)]
    ended = subprocess.run(
        [*launch, *run.arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"run {run.name!r} stopped and said: {said.removeprefix('error: ')}")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Rows under the columns that any of them has, in order of first appearance."""
    rows = list(rows)
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def identity(run: Run) -> Row:
    return {"source": "measured", "run": run.name, "seed": run.seed}


def results(experiment: Experiment, runs: Sequence[Run], *_) -> Iterator[Row]:
    """One row per run: settings, FF as the mean over all iterations, final C2I, accuracy."""
    for run in runs:
        records = run.records()
        yield identity(run) | {
            "step": run.step,
            "model": run.config.model,
            "optimizer": run.config.optimizer,
            "learning_rate": run.config.learning_rate,
            "weight_decay": run.config.weight_decay,
            "epochs": run.config.epochs,
            "ff_ratio": mean_of(records, "ff_ratio"),
            "c2i_ratio": records[-1].get("c2i_ratio"),
            "train_top1": records[-1]["train_top1"],
            "top1": records[-1]["val_top1"],
            "top5": records[-1]["val_top5"],
            "best_top1": max(record["val_top1"] for record in records),
        }


def mean_of(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean over epochs, all of the same number of iterations; None where it was not measured."""
    if name not in records[-1]:
        return None
    return sum(record[name] for record in records) / len(records)


def epochs(experiment: Experiment, runs: Sequence[Run], *_) -> Iterator[Row]:
    """One row per epoch of each run."""
    columns = ("epoch", "learning_rate", "train_loss", "train_top1", "val_loss", "val_top1")
    for run in runs:
        for record in run.records():
            yield (
                identity(run)
                | {name: record[name] for name in columns}
                | {name: record.get(name) for name in ("ff_ratio", "c2i_ratio")}
            )


def latents(experiment: Experiment, runs: Sequence[Run], *_) -> Iterator[Row]:
    """Histogram of all latent weights after each epoch: share of weights per bin [left, right]."""
    for run in runs:
        for record in run.records():
            if "layers" not in record:
                raise UserError(f"run {run.name!r} measured no latent weights: it has none")
            histograms = [layer["latent_histogram"] for layer in record["layers"].values()]
            counts = [sum(column) for column in zip(*histograms, strict=True)]
            for row in histogram_rows(counts, measures.HISTOGRAM_LIMIT):
                yield identity(run) | {"epoch": record["epoch"], "top1": record["val_top1"]} | row


def histogram_rows(counts: Sequence[int], limit: float) -> Iterator[Row]:
    width = 2 * limit / len(counts)
    total = sum(counts)
    for index, count in enumerate(counts):
        left = -limit + index * width
        yield {"left": round(left, 6), "right": round(left + width, 6), "share": count / total}


def activations(
    experiment: Experiment, runs: Sequence[Run], table: Path, dist: DistEnv
) -> Iterator[Row]:
    """Distribution and saturation at the first Sign, after the first epoch and the last."""
    for run in runs:
        held_out = open_val_images(run.config, process)
        batches = spread(held_out, experiment.settings["images"], run.config, process)
        images = torch.cat([images for images, _ in batches])
        for epoch, path in (("first", kept(run.folder, 0)), ("last", run.folder / NEWEST)):
            model = load_run(run, path).model.to(process.device)
            first = next(iter(measures.at_signs(model, images, torch.clone).values()))
            counts = measures.histogram(first, limit=ACTIVATION_LIMIT).tolist()
            found = {"epoch": epoch, "saturation": measures.saturation(first)}
            for row in histogram_rows(counts, ACTIVATION_LIMIT):
                yield identity(run) | found | row


def kernels(
    experiment: Experiment, runs: Sequence[Run], table: Path, dist: DistEnv
) -> Iterator[Row]:
    """CAM of the first binary convolution's kernels after an epoch, and of the next update."""
    for run in runs:
        before, after = one_more_step(run, process)
        cams = measures.channel_absolute_mean(before).tolist()
        updates = measures.channel_absolute_mean(after - before).tolist()
        for kernel, (cam, update) in enumerate(zip(cams, updates, strict=True)):
            yield identity(run) | {"kernel": kernel, "cam": cam, "update_cam": update}


def one_more_step(run: Run, dist: DistEnv) -> tuple[torch.Tensor, torch.Tensor]:
    """First layer's latent weights after the first epoch, and after one step of the next."""
    config, device = run.config, process.device
    path = kept(run.folder, 0)
    loaded = load_run(run, path)
    model = loaded.model.to(device)
    optimizer = build_optimizer(
        model,
        config.learning_rate,
        config.weight_decay,
        config.decay_group,
        config.optimizer,
        config.optimizer_options,
    )
    optimizer.load_state_dict(loaded.checkpoint.content["optimizer"])
    rate = learning_rate(1, config.learning_rate, config.epochs, config.schedule)
    set_learning_rate(optimizer, rate)
    images, _ = open_images(config, process)
    batches = train_loader(images, config, process)
    batches.batch_sampler.epoch = 1
    teacher = load_teacher(
        config.teacher, config.teacher_checkpoint, loaded.num_classes, config.image_size, device
    )
    layer = next(iter(measures.latent_weights(model)))
    before = measures.latent_weights(model)[layer].clone()
    batch = next(iter(batches))
    train_one_epoch(model, teacher, [batch], optimizer, device, config.label_smoothing)
    return before, measures.latent_weights(model)[layer]


def loss_surface(
    experiment: Experiment, runs: Sequence[Run], table: Path, dist: DistEnv
) -> Iterator[Row]:
    """Loss and top-1 on a grid over [-1, 1]^2; points that the CSV already has are not repeated."""
    settings = experiment.settings
    axis = torch.linspace(-1, 1, settings["points"], dtype=torch.float64).tolist()
    known = {point_key(row): row for row in read_rows(table)}
    rows: list[Row] = []
    for run in runs:
        shared = identity(run) | {
            "folder": run.folder.name,
            "images": settings["images"],
            "batch_norm": settings["batch_norm"],
        }
        points = [shared | {"alpha": alpha, "beta": beta} for alpha in axis for beta in axis]
        missing = [point for point in points if point_key(point) not in known]
        print(f"{run.name}: {len(missing)} of {len(points)} points to compute", flush=True)
        rows += [known[point_key(point)] for point in points if point_key(point) in known]
        for point in with_losses(run, missing, settings, process):
            rows.append(point)
            if point["beta"] == axis[-1]:
                write_csv(table, rows)
    yield from rows


def point_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("folder", "images", "batch_norm", "alpha", "beta"))


def read_rows(table: Path) -> list[Row]:
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def with_losses(
    run: Run, points: Sequence[Row], settings: Mapping[str, Any], dist: DistEnv
) -> Iterator[Row]:
    if not points:
        return
    model = load_run(run, run.folder / NEWEST).model.to(process.device)
    centre = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(run.seed)
    directions = tuple(surface.filter_normalised_direction(model, generator) for _ in range(2))
    train_images, held_out = open_images(run.config, process)
    batches = spread(held_out, settings["images"], run.config, process)
    calibration = []
    if settings["batch_norm"] == "recalibrated":
        calibration = spread(train_images, RECALIBRATION_IMAGES, run.config, process)
    for point in points:
        surface.move_to(model, centre, directions, point["alpha"], point["beta"])
        if calibration:
            surface.recalibrate_batch_norm(model, calibration)
        found = validate(model, batches, process.device)
        yield point | {name: found[name] for name in ("loss", "top1")}


def two_node_paths(experiment: Experiment, *_) -> Iterator[Row]:
    """(x, y) of each optimizer before each step and after the last."""
    settings = dict(experiment.settings)
    for name, optimizer in settings.pop("optimizers").items():
        path = two_nodes.descend(**optimizer, **settings, seed=0)
        for step, (x, y) in enumerate(path.tolist()):
            yield {"source": "measured", "run": name, "step": step, "x": x, "y": y}


def load_run(run: Run, path: Path) -> LoadedNetwork:
    """A checkpoint of a run, in eval mode.

    Raises:
        UserError: none there, or one of another network.
    """
    loaded = load_network(path)
    expected = (run.config.model, run.config.network_options())
    if (loaded.name, dict(loaded.options)) != expected:
        raise UserError(
            f"{path} holds {loaded}, which is not the network of run {run.name!r}:"
            " move its folder away and start again"
        )
    return loaded


def spread(images: SeededDataset, count: int, config: Config, dist: DistEnv) -> list[Batch]:
    """`count` images at even distances through the data set, in batches on the device."""
    count = min(count, len(images))
    indices = [index * len(images) // count for index in range(count)]
    batches = []
    for start in range(0, count, config.batch_size):
        pixels, labels = images.batch(indices[start : start + config.batch_size])
        batches.append((pixels.to(process.device), labels.to(process.device)))
    return batches


MEASURES = {
    "results": results,
    "epochs": epochs,
    "latents": latents,
    "activations": activations,
    "kernels": kernels,
    "surface": loss_surface,
    "two_nodes": two_node_paths,
}


if __name__ == "__main__":
    main()
