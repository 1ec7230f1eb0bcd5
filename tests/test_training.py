"""Both training programs end to end on a handful of images: results, hand-off, bad input."""

import copy
import math
import re

import pytest
import torch
import yaml
from compare import difference
from conftest import CLASSES, FROM_SCRATCH, VAL, config_with
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from utils.checkpoint.checkpoint import BEST, NEWEST, PREVIOUS, read_checkpoint
from utils.checkpoint.files import LOCK
from utils.checkpoint.manager import epoch_checkpoint_path
from utils.data.loader import PrefetchLoader
from utils.engine import train_one_epoch
from utils.optim import build_optimizer
from utils.run.config import FIELDS
from utils.run.logging import LINE_EVERY, RunLog, read_records
from utils.run.state import TrainState


def test_step2_continues_from_the_best_of_step1(run_step, tmp_path):
    step1, step2 = tmp_path / "step1", tmp_path / "step2"
    first = run_step(1)
    assert first.code == 0, first.err
    best = read_checkpoint(step1 / BEST)
    second = run_step(2, init_from=step1 / BEST, learning_rate=1e-9)
    assert second.code == 0, second.err
    described = f"this repo's layout, epoch {best.epoch}, top-1 {best.top1:.2f} %, sha256 "
    assert f"weights start from {step1 / BEST} ({described}" in second.out
    for name, weight in read_checkpoint(step2 / NEWEST).state.items():
        if not name.endswith(("running_mean", "running_var", "tracked")):
            torch.testing.assert_close(weight, best.state[name], rtol=0, atol=1e-7)
    assert read_records(step2)[0]["c2i_ratio"] > 0.999  # against the signs of step 1


def test_a_run_leaves_checkpoints_log_curves_records_and_configuration(run_step, tmp_path):
    result = run_step(1)
    folder = tmp_path / "step1"
    assert {path.name for path in folder.iterdir()} == {
        NEWEST, PREVIOUS, BEST, LOCK, "log.txt", "metrics.jsonl", "config.yaml", "tensorboard",
    }  # fmt: skip
    log = (folder / "log.txt").read_text()
    for words in ("configuration", "commit", "torch 2.", "device cpu", "seed 0", "weight decay"):
        assert words in log and words in result.out
    assert set(yaml.safe_load((folder / "config.yaml").read_text())) == set(FIELDS)

    records = read_records(folder)
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["learning_rate"] for record in records] == [1.25e-3 / 2, 0]
    assert all(record["val_images"] == len(CLASSES) * VAL for record in records)
    for split in ("train", "val"):
        for name in ("loss", "top1", "top5", "images_per_second"):
            assert all(math.isfinite(record[f"{split}_{name}"]) for record in records)

    newest, best = (read_checkpoint(folder / name).content for name in (NEWEST, BEST))
    assert {"epoch", "state_dict", "best_top1_acc", "optimizer"} <= set(newest)
    assert newest["epoch"] == 1 and newest["history"] == records
    accuracies = [record["val_top1"] for record in records]
    assert newest["best_top1_acc"] == max(accuracies)
    assert best["epoch"] == accuracies.index(max(accuracies))


def test_epochs_to_keep_leave_checkpoints_of_their_own(run_step, tmp_path):
    assert run_step(1, epochs=3, keep_epochs="[0, 2]").code == 0
    folder = tmp_path / "step1"
    assert sorted(path.name for path in folder.glob("epoch_*")) == [
        epoch_checkpoint_path(folder, epoch).name for epoch in (0, 2)
    ]
    first, last = (read_checkpoint(epoch_checkpoint_path(folder, epoch)) for epoch in (0, 2))
    assert first.epoch == 0
    assert not difference(last.content, read_checkpoint(folder / NEWEST).content)


def test_only_batchnorm_statistics_move_in_the_last_released_epoch(run_step, tmp_path):
    run_step(1, epochs=1)
    run_step(1, epochs=1, save=tmp_path / "again", seed=0)
    state = read_checkpoint(tmp_path / "step1" / NEWEST).state
    assert not difference(state, read_checkpoint(tmp_path / "again" / NEWEST).state)
    assert all(not value.any() for key, value in state.items() if "move" in key)
    assert state["feature.0.bn1.running_mean"].any()


def test_textbook_options_train(run_step):
    textbook = {
        "schedule": "textbook",
        "lighting": "textbook",
        "decay_group": "convolutions",
        "latent_init": "symmetric",
        "activation_ste": "clip",
        "label_smoothing": 0.1,
        "init_from": "none",
    }
    assert run_step(2, epochs=1, **textbook).code == 0


def test_the_reversed_order_trains_with_another_optimizer(run_step, tmp_path):
    options = {"optimizer": "SGD", "optimizer_options": "{momentum: 0.9}"}
    weights_first = {"binary_activations": "false", "binary_weights": "true"}
    assert run_step(1, **weights_first, **options).code == 0
    result = run_step(2, init_from=tmp_path / "step1" / BEST, **options)
    assert result.code == 0, result.err


def test_progress_is_a_plain_line_every_hundred_batches(run_step, monkeypatch):
    assert LINE_EVERY == 100
    monkeypatch.setattr("utils.run.logging.LINE_EVERY", 5)
    result = run_step(1, batch_size=2, epochs=1)
    lines = [line.split(":")[0] for line in result.out.splitlines() if " train " in line]
    assert lines[:2] == ["epoch 0 train 5/12", "epoch 0 train 10/12"]


# Bad input: one sentence, exit code not 0, nothing written.


def test_step2_without_step1_says_so_and_where_it_looked(run_step, tmp_path):
    missing = tmp_path / "nowhere" / BEST
    result = run_step(2, init_from=missing)
    result.assert_one_sentence("run step 1 first", str(missing))
    assert not (tmp_path / "step2").exists()


def test_file_that_is_no_image(run_step, tmp_path, own_images):
    broken = own_images / "train" / "star" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    for workers in (0, 1):
        result = run_step(1, data=own_images, workers=workers)
        result.assert_one_sentence(f"cannot decode image {broken}")
    assert not (tmp_path / "step1" / NEWEST).exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "val").rename(folder / "test"), "/val does not exist"),
        (lambda folder: (folder / "val" / "star").rename(folder / "val" / "moon"), "moon, star"),
        (lambda folder: (folder / "train" / "empty").mkdir(), "class without images"),
    ],
)
def test_folder_that_cannot_be_trained_on(run_step, own_images, spoil, words):
    spoil(own_images)
    run_step(1, data=own_images).assert_one_sentence(str(own_images), words)


def test_folder_that_cannot_be_written(run_step, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    run_step(1, save=file / "out").assert_one_sentence(f"cannot write to {file}/out", "--save")
    run_step(1, save="/proc/out").assert_one_sentence("cannot write to /proc/out")
    assert file.read_text() == "in the way"


def test_tensorboard_holds_every_epoch_also_one_that_ended_before_it_was_logged(
    run_step, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_epoch_end", interrupt)
        assert run_step(1).code == "interrupted"
    assert run_step(1).code == 0
    events = EventAccumulator(str(tmp_path / "step1" / "tensorboard"))
    events.Reload()
    scalars = {"learning_rate", "train_loss", "val_top1", "val_top5", "train_images_per_second"}
    scalars |= {"ff_ratio", "c2i_ratio", "layers/feature.1.binary_3x3/sdam"}
    assert scalars <= set(events.Tags()["scalars"])
    assert "layers/feature.1.binary_3x3/latent_histogram" in events.Tags()["histograms"]
    assert [event.step for event in events.Scalars("val_top1")] == [0, 1]


def test_an_epoch_is_a_plain_loop_of_torch():
    config = config_with(teacher=None, optimizer="SGD", learning_rate=0.1, weight_decay=0.0)
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    plain = copy.deepcopy(ours)
    ours.eval()  # as validation leaves it
    batches = [(torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1])) for _ in range(3)]
    train_one_epoch(ours, None, batches, build_optimizer(ours, config), config, TrainState())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("step", [1, 2])
def test_each_epoch_has_an_order_of_its_own(run_step, monkeypatch, step):
    set_epoch = PrefetchLoader.set_epoch

    def printed(loader, epoch, start_batch=0):
        print("order", epoch)
        set_epoch(loader, epoch, start_batch)

    monkeypatch.setattr(PrefetchLoader, "set_epoch", printed)
    result = run_step(step, **(FROM_SCRATCH if step == 2 else {}), epochs=2)
    assert re.findall("order (.)", result.out) == ["0", "1"], result.err
