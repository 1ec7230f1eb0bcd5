"""What an experiment measures of its trained runs: the rows of its CSV."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import update_bn

from models.checkpoints import load_network
from models.teacher import load_teacher
from scripts.experiments import surface, two_nodes
from scripts.experiments.spec import Run
from scripts.experiments.table import as_text, read_table, write_table
from utils import metrics
from utils.checkpoint.checkpoint import NEWEST
from utils.checkpoint.manager import epoch_checkpoint_path
from utils.data.dataset import SeededDataset, open_train_images, open_val_images
from utils.data.loader import PrefetchLoader, train_loader
from utils.data.transforms import ValTransform
from utils.engine import evaluate, train_one_epoch
from utils.optim import build_optimizer, set_learning_rate
from utils.precision import place, set_precision
from utils.run.distributed import DistEnv
from utils.run.state import TrainState

ACTIVATION_LIMIT = 3.0
RECALIBRATION_IMAGES = 1000
LATENT_EPOCHS = 6  # of which Fig. 7 has histograms

Runs = Sequence[Run]
Settings = Mapping[str, Any]  # of the experiment
Row = dict[str, Any]
Rows = Iterator[Row]
Layers = Mapping[str, Tensor]


def identity(run: Run) -> Row:
    return {"source": "measured", "run": run.name, "seed": run.seed}


def results(runs: Runs, settings: Settings, dist: DistEnv, *_) -> Rows:
    """One row per run: settings, FF as the mean over all iterations, final C2I, accuracy."""
    columns = ("model", "optimizer", "learning_rate", "weight_decay", "epochs")
    for run in runs:
        records = run.records()
        # All epochs have the same number of iterations.
        ff_ratios = [record["ff_ratio"] for record in records if "ff_ratio" in record]
        row = identity(run) | {
            "step": run.step,
            **{name: getattr(run.config, name) for name in columns},
            "ff_ratio": sum(ff_ratios) / len(ff_ratios) if ff_ratios else None,
            "c2i_ratio": records[-1].get("c2i_ratio"),
            "train_top1": records[-1]["train_top1"],
            "top1": records[-1]["val_top1"],
            "top5": records[-1]["val_top5"],
            "best_top1": max(record["val_top1"] for record in records),
        }
        if settings.get("decay_to_gradient"):
            has_decay = run.config.weight_decay and "layers" in records[0]
            row["decay_to_gradient"] = decay_to_gradient(run, dist) if has_decay else None
        yield row


def decay_to_gradient(run: Run, dist: DistEnv) -> float:
    """weight_decay |w| / |gradient| of all latent weights, in the step after the first epoch."""
    weights, _, gradients = next_step(run, dist)
    ratio = get_total_norm(weights.values()) / get_total_norm(gradients.values())
    return run.config.weight_decay * ratio.item()


def epochs(runs: Runs, settings: Settings, dist: DistEnv, *_) -> Rows:
    """One row per epoch of each run; the last with `fixed_train_top1`, if settings ask for it."""
    columns = ("epoch", "learning_rate", "train_loss", "train_top1", "val_loss", "val_top1")
    columns += ("ff_ratio", "c2i_ratio")
    for run in runs:
        *earlier, last = (
            identity(run) | {column: record.get(column) for column in columns}
            for record in run.records()
        )
        if "fixed_images" in settings:
            last["fixed_train_top1"] = fixed_train_top1(run, settings["fixed_images"], dist)
        yield from (*earlier, last)


def fixed_train_top1(run: Run, count: int, dist: DistEnv) -> float:
    """Top-1 of the finished run on training images as those of validation are: not augmented."""
    config = dataclasses.replace(run.config, decoder="pil")
    images = open_train_images(config)
    images.transform = ValTransform(config)
    model = load_network(run.folder / NEWEST).model.to(dist.device)
    return evaluate(model, some_of(images, count, run, dist)).results()["top1"]


def layers(runs: Runs, *_) -> Rows:
    """One row per epoch and binary convolution of each run, with the Sign before it."""
    columns = ("ff_ratio", "c2i_ratio", "smallest_cam", "sdam")
    for run in runs:
        for record in run.records():
            signs = zip_longest(record["layers"].values(), record.get("saturation", {}).values())
            for number, (layer, saturation) in enumerate(signs, start=1):
                row = identity(run) | {"epoch": record["epoch"], "layer": number}
                row |= {column: layer[column] for column in columns}
                yield row | {"saturation": saturation}


def latents(runs: Runs, *_) -> Rows:
    """Histogram of all latent weights of step 2 after some epochs: share per bin [left, right].

    rate_sum is the sum of the learning rates of all iterations so far.
    """
    for run in runs:
        if run.step == 1:  # there they are no latent weights yet
            continue
        records = run.records()
        shown = np.linspace(0, len(records) - 1, LATENT_EPOCHS).round()
        rate_sum = 0.0
        for record in records:
            iterations = record["train_images"] / run.config.batch_size
            rate_sum += record["learning_rate"] * iterations
            if record["epoch"] not in shown:
                continue
            constant = {"epoch": record["epoch"], "rate_sum": rate_sum, "top1": record["val_top1"]}
            histograms = [layer["latent_histogram"] for layer in record["layers"].values()]
            counts = np.sum(histograms, axis=0).tolist()
            for row in histogram_rows(counts, metrics.HISTOGRAM_LIMIT):
                yield identity(run) | constant | row


def histogram_rows(counts: Sequence[int], limit: float) -> Rows:
    ends = np.linspace(-limit, limit, len(counts) + 1).round(6).tolist()
    for (left, right), count in zip(pairwise(ends), counts, strict=True):
        yield {"left": left, "right": right, "share": count / sum(counts)}


def activations(runs: Runs, settings: Settings, dist: DistEnv, *_) -> Rows:
    """Distribution and saturation at the first Sign, after the first epoch and the last."""
    for run in runs:
        batches = some_of(open_val_images(run.config), settings["images"], run, dist)
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
        before, after, _ = next_step(run, dist)
        first = next(iter(before))
        cams = metrics.channel_absolute_mean(before[first]).tolist()
        updates = metrics.channel_absolute_mean(after[first] - before[first]).tolist()
        for kernel, (cam, update) in enumerate(zip(cams, updates, strict=True)):
            yield identity(run) | {"kernel": kernel, "cam": cam, "update_cam": update}


def next_step(run: Run, dist: DistEnv) -> tuple[Layers, Layers, Layers]:
    """Latent weights after the first epoch, after one step more, and that step's gradients.

    The step is made in one process, with BN statistics of the whole batch.
    """
    set_precision(run.config.precision)
    loaded = load_network(epoch_checkpoint_path(run.folder, 0))
    model = place(loaded.model, run.config, dist.device)  # Adam's state has its memory layout
    optimizer = build_optimizer(model, run.config)
    optimizer.load_state_dict(loaded.checkpoint.content["optimizer"])
    set_learning_rate(optimizer, 1, run.config)
    batches = train_loader(open_train_images(run.config), run.config, dist)
    batches.set_epoch(1)
    teacher = load_teacher(run.config, loaded.num_classes, dist.device)
    after = metrics.latent_weights(model)  # the step changes them in place
    before = {name: weight.clone() for name, weight in after.items()}
    train_one_epoch(model, teacher, [next(iter(batches))], optimizer, run.config, TrainState())
    set_precision("float32")
    return before, after, {name: model.get_submodule(name).weight.grad for name in after}


def loss_surface(runs: Runs, settings: Settings, dist: DistEnv, table: Path) -> Rows:
    """Loss and top-1 on a grid over [-1, 1]^2; points that the CSV already has are not repeated.

    `distance` is that from the centre, `rise` the loss less that at the centre, `rough` how far the
    loss lies from its neighbours'.
    """
    axis = np.linspace(-1, 1, settings["points"]).round(6).tolist()
    earlier = read_table(table) if table.exists() else []
    known = {grid_point(row): row for row in earlier}
    for run, batch_norm in product(runs, settings["batch_norm"]):
        constant = identity(run) | {"folder": run.folder.name, "images": settings["images"]}
        constant |= {"batch_norm": batch_norm}
        grid = [constant | {"alpha": alpha, "beta": beta} for alpha in axis for beta in axis]
        missing = [row for row in grid if grid_point(row) not in known]
        print(f"{run.name}, BN {batch_norm}: {len(missing)} of {len(grid)} points", flush=True)
        for row in with_losses(run, missing, dist) if missing else ():
            known[grid_point(row)] = row
            if row["beta"] == axis[-1]:
                write_table(table, known.values())
        losses = np.array([float(known[grid_point(point)]["loss"]) for point in grid])
        rises = losses - losses[len(losses) // 2]
        rough = surface.roughness(losses.reshape(len(axis), -1)).flat
        for point, rise, of_point in zip(grid, rises, rough, strict=True):
            distance = round(math.hypot(point["alpha"], point["beta"]), 2)
            measured = {"distance": distance, "rise": rise, "rough": of_point}
            yield known[grid_point(point)] | measured


def grid_point(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("folder", "images", "batch_norm", "alpha", "beta")
    return tuple(str(as_text(row.get(name))) for name in names)


def with_losses(run: Run, points: Sequence[Row], dist: DistEnv) -> Rows:
    model = load_network(run.folder / NEWEST).model.to(dist.device)
    centre = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(run.seed)
    directions = tuple(surface.filter_normalised_direction(model, generator) for _ in range(2))
    batches = [*some_of(open_val_images(run.config), points[0]["images"], run, dist)]
    train_images = open_train_images(run.config)
    calibration = [*some_of(train_images, RECALIBRATION_IMAGES, run, dist)]
    for point in points:
        surface.move_to(model, centre, directions, point["alpha"], point["beta"])
        if point["batch_norm"] == "recalibrated":
            update_bn(calibration, model)
        results = evaluate(model, batches).results()
        yield point | {name: as_text(results[name]) for name in ("loss", "top1")}


def some_of(images: SeededDataset, count: int, run: Run, dist: DistEnv) -> PrefetchLoader:
    """`count` images at even distances through the data set, in the run's batches."""
    keys = [(0, index) for index in images.evenly_spaced(count)]
    size = run.config.batch_size
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    return PrefetchLoader(images, batches, run.config.workers, dist.device)


def two_node_paths(runs: Runs, settings: Settings, *_) -> Rows:
    """(x, y) of each optimizer before every tenth step and after the last."""
    shared = {name: settings[name] for name in ("steps", "noise", "batch_size")}
    for seed, name in product(range(settings["seeds"]), settings["optimizers"]):
        path = two_nodes.descend(**settings["optimizers"][name], **shared, seed=seed).tolist()
        for step in range(0, len(path), 10):
            x, y = path[step]
            yield {"source": "measured", "run": name, "seed": seed, "step": step, "x": x, "y": y}


MEASURES = {
    "results": results,
    "epochs": epochs,
    "layers": layers,
    "latents": latents,
    "activations": activations,
    "kernels": kernels,
    "surface": loss_surface,
    "two_nodes": two_node_paths,
}
