"""What experiments make of the records of a run, against numbers computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES, TRAIN, command_line, config_with, dist_env

from scripts.experiments.measures import latents, layers, results, some_of
from scripts.experiments.spec import Experiment, resolve_runs
from utils.data.dataset import open_train_images
from utils.data.transforms import ValTransform


def finished(*records, step=2, **options) -> SimpleNamespace:
    """A run of which these records are left."""
    config = config_with(model="reactnet_a", epochs=len(records), **options)
    return SimpleNamespace(
        name="A", seed=3, step=step, config=config, records=lambda: list(records)
    )


def test_a_row_of_results_has_the_mean_ff_the_final_c2i_and_the_last_and_best_accuracy():
    accuracies = {"train_top1": 20, "val_top5": 90}
    run = finished(
        {"ff_ratio": 0.3, "c2i_ratio": 0.9, "val_top1": 50, **accuracies},
        {"ff_ratio": 0.1, "c2i_ratio": 0.6, "val_top1": 40, **accuracies},
    )
    (row,) = results([run], {}, dist_env())
    assert row["ff_ratio"] == pytest.approx(0.2) and row["c2i_ratio"] == 0.6
    assert (row["top1"], row["best_top1"], row["train_top1"], row["top5"]) == (40, 50, 20, 90)
    assert (row["run"], row["seed"], row["epochs"], row["learning_rate"]) == ("A", 3, 2, 1e-3)


def test_latents_are_summed_over_layers_and_their_rates_over_all_iterations():
    counts = {"a": {"latent_histogram": [1, 0, 2]}, "b": {"latent_histogram": [3, 4, 0]}}
    epochs = [
        {"epoch": e, "train_images": 40, "learning_rate": r, "val_top1": e, "layers": counts}
        for e, r in enumerate([0.5, 0.25, 0.125])
    ]
    rows = list(latents([finished(*epochs, batch_size=8), finished(*epochs, step=1)], {}))
    assert [(row["left"], row["right"]) for row in rows[:3]] == [
        (-1.5, -0.5),
        (-0.5, 0.5),
        (0.5, 1.5),
    ]
    assert [row["share"] for row in rows] == 3 * [0.4, 0.4, 0.2]
    assert [row["rate_sum"] for row in rows[::3]] == [2.5, 3.75, 4.375]


def test_rows_of_layers_pair_each_convolution_with_the_sign_before_it():
    of_layer = {"c2i_ratio": 1.0, "smallest_cam": 0.1, "sdam": 0.2}
    convolutions = {"a": of_layer | {"ff_ratio": 0.1}, "b": of_layer | {"ff_ratio": 0.2}}
    record = {"epoch": 4, "layers": convolutions}
    with_signs = record | {"saturation": {"s": 0.5, "t": 0.6}}
    rows = list(layers([finished(record, with_signs)]))
    assert [(row["layer"], row["ff_ratio"]) for row in rows] == 2 * [(1, 0.1), (2, 0.2)]
    assert [row["saturation"] for row in rows] == [None, None, 0.5, 0.6]


def test_images_to_measure_on_are_taken_at_even_distances(image_folder, tmp_path):
    sizes = {"image_size": 16, "val_resize": 16, "batch_size": 4, "workers": 0}
    options = command_line({"data": image_folder, **sizes})
    experiment = Experiment(title="", measure="results", runs={"A": {"step": 2}})
    (run,) = resolve_runs(experiment, "quick", [0], tmp_path, options)
    images = open_train_images(run.config)
    images.transform = ValTransform(run.config)
    batches = list(some_of(images, 6, run, dist_env()))
    assert [len(labels) for _, labels in batches] == [4, 2]
    expected, _ = images.batch([0, 4, 8, 12, 16, 20])
    assert (expected == torch.cat([images for images, _ in batches])).all()
    assert len(images.evenly_spaced(1000)) == len(CLASSES) * TRAIN
