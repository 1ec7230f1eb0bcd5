"""What an experiment measures of its trained runs: the rows of its CSV."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import update_bn

from models.checkpoints import load_network
from models.teacher import load_teacher
from scripts.experiments import surface, two_nodes
from scripts.experiments.spec import Run
from scripts.experiments.table import read_table, write_table
from utils import metrics
from utils.checkpoint.checkpoint import NEWEST
from utils.checkpoint.manager import epoch_checkpoint_path
from utils.data.dataset import SeededDataset, open_train_images, open_val_images
from utils.data.loader import PrefetchLoader, train_loader
from utils.engine import evaluate, train_one_epoch
from utils.optim import build_optimizer, set_learning_rate
from utils.run.distributed import DistEnv
from utils.run.errors import UserError
from utils.run.state import TrainState

ACTIVATION_LIMIT = 3.0
RECALIBRATION_IMAGES = 1000

Runs = Sequence[Run]
Settings = Mapping[str, Any]  # of the experiment
Row = dict[str, Any]
Rows = Iterator[Row]


def identity(run: Run) -> Row:
    return {"source": "measured", "run": run.name, "seed": run.seed}


def results(runs: Runs, *_) -> Rows:
    """One row per run: settings, FF as the mean over all iterations, final C2I, accuracy."""
    settings = ("model", "optimizer", "learning_rate", "weight_decay", "epochs")
    for run in runs:
        records = run.records()
        # All epochs have the same number of iterations.
        ff_ratios = [record["ff_ratio"] for record in records if "ff_ratio" in record]
        yield identity(run) | {
            "step": run.step,
            **{name: getattr(run.config, name) for name in settings},
            "ff_ratio": sum(ff_ratios) / len(ff_ratios) if ff_ratios else None,
            "c2i_ratio": records[-1].get("c2i_ratio"),
            "train_top1": records[-1]["train_top1"],
            "top1": records[-1]["val_top1"],
            "top5": records[-1]["val_top5"],
            "best_top1": max(record["val_top1"] for record in records),
        }


def epochs(runs: Runs, *_) -> Rows:
    """One row per epoch of each run."""
    columns = ("epoch", "learning_rate", "train_loss", "train_top1", "val_loss", "val_top1")
    columns += ("ff_ratio", "c2i_ratio")
    for run in runs:
        for record in run.records():
            yield identity(run) | {column: record.get(column) for column in columns}


def latents(runs: Runs, *_) -> Rows:
    """Histogram of all latent weights after each epoch: share of weights per bin [left, right]."""
    for run in runs:
        for record in run.records():
            if "layers" not in record:
                raise UserError(f"run {run.name!r} measured no latent weights: it has none")
            histograms = [layer["latent_histogram"] for layer in record["layers"].values()]
            counts = [sum(column) for column in zip(*histograms, strict=True)]
            for row in histogram_rows(counts, metrics.HISTOGRAM_LIMIT):
                yield identity(run) | {"epoch": record["epoch"], "top1": record["val_top1"]} | row


def histogram_rows(counts: Sequence[int], limit: float) -> Rows:
    width = 2 * limit / len(counts)
    total = sum(counts)
    for index, count in enumerate(counts):
        left = -limit + index * width
        yield {"left": round(left, 6), "right": round(left + width, 6), "share": count / total}


def activations(runs: Runs, settings: Settings, dist: DistEnv, *_) -> Rows:
    """Distribution and saturation at the first Sign, after the first epoch and the last."""
    for run in runs:
        batches = evenly_spaced(open_val_images(run.config, dist), settings["images"], run, dist)
        images = torch.cat([images for images, _ in batches])
        paths = {"first": epoch_checkpoint_path(run.folder, 0), "last": run.folder / NEWEST}
        for epoch, path in paths.items():
            model = load_network(path).model.to(dist.device)
            first, *_ = metrics.at_signs(model, images, torch.clone).values()
            counts = metrics.histogram(first, limit=ACTIVATION_LIMIT).tolist()
            constant = {"epoch": epoch, "saturation": metrics.saturation(first)}
            for row in histogram_rows(counts, ACTIVATION_LIMIT):
                yield identity(run) | constant | row


def kernels(runs: Runs, settings: Settings, dist: DistEnv, *_) -> Rows:
    """CAM of the first binary convolution's kernels after an epoch, and of the next update."""
    for run in runs:
        loaded = load_network(epoch_checkpoint_path(run.folder, 0))
        model = loaded.model.to(dist.device)
        optimizer = build_optimizer(model, run.config)
        optimizer.load_state_dict(loaded.checkpoint.content["optimizer"])
        set_learning_rate(optimizer, 1, run.config)
        batches = train_loader(open_train_images(run.config, dist), run.config, dist)
        batches.set_epoch(1)
        teacher = load_teacher(run.config, loaded.num_classes, dist.device)
        weight = next(iter(metrics.latent_weights(model).values()))  # the step changes it in place
        before = weight.clone()
        train_one_epoch(model, teacher, [next(iter(batches))], optimizer, run.config, TrainState())
        cams = metrics.channel_absolute_mean(before).tolist()
        updates = metrics.channel_absolute_mean(weight - before).tolist()
        for kernel, (cam, update) in enumerate(zip(cams, updates, strict=True)):
            yield identity(run) | {"kernel": kernel, "cam": cam, "update_cam": update}


def loss_surface(runs: Runs, settings: Settings, dist: DistEnv, table: Path) -> Rows:
    """Loss and top-1 on a grid over [-1, 1]^2; points that the CSV already has are not repeated."""
    axis = torch.linspace(-1, 1, settings["points"], dtype=torch.float64).tolist()
    earlier = read_table(table) if table.exists() else []
    known = {grid_point(row): row for row in earlier}
    for run in runs:
        constant = identity(run) | {"folder": run.folder.name}
        constant |= {name: settings[name] for name in ("images", "batch_norm")}
        grid = [constant | {"alpha": alpha, "beta": beta} for alpha in axis for beta in axis]
        missing = [row for row in grid if grid_point(row) not in known]
        print(f"{run.name}: {len(missing)} of {len(grid)} points to compute", flush=True)
        for row in with_losses(run, missing, settings, dist) if missing else ():
            known[grid_point(row)] = row
            if row["beta"] == axis[-1]:
                write_table(table, known.values())
        yield from (known[grid_point(row)] for row in grid)


def grid_point(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(n)) for n in ("folder", "images", "batch_norm", "alpha", "beta"))


def with_losses(run: Run, points: Sequence[Row], settings: Settings, dist: DistEnv) -> Rows:
    model = load_network(run.folder / NEWEST).model.to(dist.device)
    centre = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(run.seed)
    directions = tuple(surface.filter_normalised_direction(model, generator) for _ in range(2))
    batches = evenly_spaced(open_val_images(run.config, dist), settings["images"], run, dist)
    if settings["batch_norm"] == "recalibrated":
        train_images = open_train_images(run.config, dist)
        calibration = evenly_spaced(train_images, RECALIBRATION_IMAGES, run, dist)
    for point in points:
        surface.move_to(model, centre, directions, point["alpha"], point["beta"])
        if settings["batch_norm"] == "recalibrated":
            update_bn(calibration, model)
        meter = evaluate(model, batches)
        yield point | {name: meter.results()[name] for name in ("loss", "top1")}


def evenly_spaced(
    images: SeededDataset, count: int, run: Run, dist: DistEnv
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` images at even distances through the data set, in batches on the device."""
    count = min(count, len(images))
    keys = [(0, index * len(images) // count) for index in range(count)]
    size = run.config.batch_size
    batches = [keys[start : start + size] for start in range(0, count, size)]
    return list(PrefetchLoader(images, batches, run.config.workers, dist.device))


def two_node_paths(runs: Runs, settings: Settings, *_) -> Rows:
    """(x, y) of each optimizer before each step and after the last."""
    shared = {name: settings[name] for name in ("steps", "noise", "batch_size")}
    for name, optimizer in settings["optimizers"].items():
        path = two_nodes.descend(**optimizer, **shared, seed=0)
        for step, (x, y) in enumerate(path.tolist()):
            yield {"source": "measured", "run": name, "step": step, "x": x, "y": y}


MEASURES = {
    "results": results,
    "epochs": epochs,
    "latents": latents,
    "activations": activations,
    "kernels": kernels,
    "surface": loss_surface,
    "two_nodes": two_node_paths,
}
