"""Both training programs end to end on a handful of images: results, hand-off, continuation."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CLASSES, VAL, write_images

from utils import engine
from utils.checkpoint.checkpoint import BEST, NEWEST, PREVIOUS, kept
from utils.run.config import FIELDS


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_tensors(left, right) -> None:
    """Nested dicts and lists with bit-identical tensors."""
    if torch.is_tensor(left):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_tensors(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same_tensors(*pair)
    else:
        assert left == right


def assert_same_run(left: Path, right: Path) -> None:
    """Two checkpoints with the same bits in all that a run computes, its speed apart."""
    contents = [read(path) for path in (left, right)]
    assert contents[0].keys() == contents[1].keys()
    for content in contents:
        del content["config"]
        for record in content["history"]:
            assert record.pop("train_images_per_second") and record.pop("val_images_per_second")
    assert_same_tensors(*contents)


def test_step2_continues_from_the_best_of_step1(run_step, tmp_path):
    step1, step2 = tmp_path / "step1", tmp_path / "step2"
    first = run_step(1)
    assert first.code == 0, first.err
    best = read(step1 / BEST)
    second = run_step(2, init_from=step1 / BEST, learning_rate=1e-9)
    assert second.code == 0, second.err
    accuracy, epoch = best["best_top1_acc"], best["epoch"]
    told = f"{step1 / BEST} (this repo's layout, epoch {epoch}, top-1 {accuracy:.2f} %, sha256 "
    assert f"weights start from {told}" in second.out
    for name, weight in read(step2 / NEWEST)["state_dict"].items():
        if not name.endswith(("running_mean", "running_var", "tracked")):
            torch.testing.assert_close(weight, best["state_dict"][name], rtol=0, atol=1e-7)


def test_a_run_leaves_checkpoints_log_curves_records_and_configuration(run_step, tmp_path):
    result = run_step(1)
    folder = tmp_path / "step1"
    assert {path.name for path in folder.iterdir()} == {
        NEWEST, PREVIOUS, BEST, "log.txt", "metrics.jsonl", "config.yaml", "tensorboard",
    }  # fmt: skip
    log = (folder / "log.txt").read_text()
    for words in ("configuration", "commit", "torch 2.", "device cpu", "seed 0", "weight decay"):
        assert words in log and words in result.out
    assert set(yaml.safe_load((folder / "config.yaml").read_text())) == set(FIELDS)

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["learning_rate"] for record in records] == [1.25e-3 / 2, 0]
    assert all(record["val_images"] == len(CLASSES) * VAL for record in records)
    for split in ("train", "val"):
        for name in ("loss", "top1", "top5", "images_per_second"):
            assert all(math.isfinite(record[f"{split}_{name}"]) for record in records)

    newest, best = read(folder / NEWEST), read(folder / BEST)
    assert {"epoch", "state_dict", "best_top1_acc", "optimizer"} <= set(newest)
    assert newest["epoch"] == 1 and newest["history"] == records
    accuracies = [record["val_top1"] for record in records]
    assert newest["best_top1_acc"] == max(accuracies)
    assert best["epoch"] == accuracies.index(max(accuracies))


def test_epochs_to_keep_leave_checkpoints_of_their_own(run_step, tmp_path):
    assert run_step(1, epochs=3, keep_epochs="[0, 2]").code == 0
    folder = tmp_path / "step1"
    assert sorted(path.name for path in folder.glob("epoch_*")) == [
        kept(folder, epoch).name for epoch in (0, 2)
    ]
    assert read(kept(folder, 0))["epoch"] == 0
    assert_same_tensors(read(kept(folder, 2)), read(folder / NEWEST))


def test_only_batchnorm_statistics_move_in_the_last_released_epoch(run_step, tmp_path):
    run_step(1, epochs=1)
    untouched = tmp_path / "again"
    torch.manual_seed(0)
    run_step(1, epochs=1, save=untouched, seed=0)
    state = read(tmp_path / "step1" / NEWEST)["state_dict"]
    assert_same_tensors(state, read(untouched / NEWEST)["state_dict"])
    assert all(not value.any() for key, value in state.items() if "move" in key)
    assert state["feature.0.bn1.running_mean"].any()


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted_run_ends_with_the_bits_of_an_unbroken_one(
    run_step, tmp_path, monkeypatch, step
):
    run_step(1, save=tmp_path / "teacher", binary_activations="false")
    teacher = tmp_path / "teacher" / BEST if step == 2 else "none"
    options = {"epochs": 4, "learning_rate": 1e-2, "init_from": "none", "teacher": teacher}
    whole = run_step(step, save=tmp_path / "whole", **options)
    assert whole.code == 0, whole.err

    original = engine.train_one_epoch
    epochs = iter(range(4))

    def stops_in_the_third_epoch(model, teacher, batches, *rest):
        if next(epochs) == 2:
            original(model, teacher, [next(iter(batches))], *rest)
            raise KeyboardInterrupt
        return original(model, teacher, batches, *rest)

    monkeypatch.setattr(engine, "train_one_epoch", stops_in_the_third_epoch)
    assert run_step(step, save=tmp_path / "broken", **options).code != 0
    monkeypatch.setattr(engine, "train_one_epoch", original)
    torch.manual_seed(99)
    continued = run_step(step, save=tmp_path / "broken", **options)
    assert "weights start from epoch 1 of this run" in continued.out

    assert_same_run(tmp_path / "whole" / NEWEST, tmp_path / "broken" / NEWEST)
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3]


def test_a_finished_run_started_again_changes_nothing(run_step, tmp_path):
    run_step(1)
    before = (tmp_path / "step1" / NEWEST).read_bytes()
    again = run_step(1)
    assert again.code == 0 and "finished: best val top-1" in again.out
    assert (tmp_path / "step1" / NEWEST).read_bytes() == before


def test_a_teacher_trained_here_gives_soft_targets_without_being_changed(run_step, tmp_path):
    assert run_step(1, save=tmp_path / "teacher", binary_activations="false").code == 0
    teacher = tmp_path / "teacher" / BEST
    before = teacher.read_bytes()
    result = run_step(1, teacher=teacher)
    assert result.code == 0, result.err
    assert teacher.read_bytes() == before


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


def test_progress_is_a_plain_line_every_hundred_batches(run_step, image_folder):
    result = run_step(1, batch_size=2, epochs=1)
    assert "train 100/" not in result.out
    from utils import runlog

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "LINE_EVERY", 5)
        result = run_step(1, batch_size=2, epochs=1, save=image_folder.parent / "lines")
    assert "epoch 0 train 5/12: loss" in result.out


# Bad input: one sentence, exit code not 0, nothing written.


def test_step2_without_step1_says_so_and_where_it_looked(run_step, tmp_path):
    missing = tmp_path / "nowhere" / BEST
    result = run_step(2, init_from=missing)
    result.assert_one_sentence("run step 1 first", str(missing))
    assert not (tmp_path / "step2").exists()


def test_missing_data_folder(run_step, tmp_path):
    result = run_step(1, data=tmp_path / "nowhere")
    result.assert_one_sentence(f"data folder {tmp_path}/nowhere/train does not exist", "--data")
    assert not (tmp_path / "step1").exists()


def test_missing_validation_folder(run_step, tmp_path, image_folder):
    result = run_step(1, val_dir="test")
    result.assert_one_sentence(f"{image_folder}/test does not exist")


def test_empty_class_folder(run_step, tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "train" / "empty").mkdir()
    run_step(1, data=folder).assert_one_sentence("class without images", "empty")


def test_file_that_is_no_image(run_step, tmp_path):
    folder = write_images(tmp_path / "images")
    broken = folder / "train" / "star" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    for workers in (0, 1):
        result = run_step(1, data=folder, workers=workers)
        result.assert_one_sentence(f"cannot decode image {broken}")
    assert not (tmp_path / "step1" / NEWEST).exists()


def test_classes_that_differ_between_training_and_validation(run_step, tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "val" / "star").rename(folder / "val" / "moon")
    run_step(1, data=folder).assert_one_sentence("3 classes", "moon, star")


def test_teacher_with_another_class_count(run_step, tmp_path):
    folder = write_images(tmp_path / "images", ("bars", "disc"))
    assert run_step(1, data=folder, save=tmp_path / "teacher").code == 0
    result = run_step(1, teacher=tmp_path / "teacher" / BEST)
    result.assert_one_sentence("has 2 classes and the data 3")


def test_checkpoint_of_another_architecture_names_keys(run_step, tmp_path):
    from torchvision.models import resnet18

    other = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), other)
    result = run_step(2, init_from=other)
    result.assert_one_sentence(str(other), "lacks", "feature.0.conv1.weight", "left over", "bn1")


def test_checkpoint_of_another_class_count_names_the_shapes(run_step, tmp_path):
    folder = write_images(tmp_path / "images", ("bars", "disc"))
    run_step(1, data=folder)
    result = run_step(2, init_from=tmp_path / "step1" / BEST)
    result.assert_one_sentence("fc.weight (2, 32) instead of (3, 32)")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_previous_one(run_step, tmp_path, damage):
    whole = run_step(1, save=tmp_path / "whole")
    assert whole.code == 0
    run_step(1)
    newest = tmp_path / "step1" / NEWEST
    data = newest.read_bytes()
    damaged = {"cut": data[: len(data) // 2], "flipped": data[:9999] + b"?" + data[10000:]}
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(damaged[damage])
    again = run_step(1)
    assert again.code == 0, again.err
    assert "weights start from epoch 0 of this run" in again.out
    assert ("warning: " + str(newest) in again.out) == (damage != "missing")
    for name in (NEWEST, PREVIOUS):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "step1" / name)


def test_damage_to_both_checkpoints_stops_a_continuation_and_changes_neither(run_step, tmp_path):
    run_step(1)
    files = [tmp_path / "step1" / name for name in (NEWEST, PREVIOUS)]
    for path in files:
        path.write_bytes(path.read_bytes()[:5000])
    run_step(1).assert_one_sentence(str(files[0]), "damaged or truncated")
    assert [path.stat().st_size for path in files] == [5000, 5000]


def test_other_settings_do_not_overwrite_a_run(run_step, tmp_path):
    run_step(1)
    before = {p: p.read_bytes() for p in (tmp_path / "step1").iterdir() if p.is_file()}
    result = run_step(1, learning_rate=0.5)
    result.assert_one_sentence("learning_rate 0.5 (there 0.00125)", "--save")
    assert before == {p: p.read_bytes() for p in (tmp_path / "step1").iterdir() if p.is_file()}


def test_a_foreign_checkpoint_in_the_folder_is_not_continued(run_step, tmp_path):
    run_step(1)
    newest = tmp_path / "step1" / NEWEST
    torch.save({"state_dict": read(newest)["state_dict"], "epoch": 1}, newest)
    run_step(1).assert_one_sentence("cannot be continued")


def test_unknown_option_lists_the_valid_ones(run_step):
    run_step(1, "--momentum", "0.9").assert_one_sentence("'--momentum'", "--learning_rate")


def test_unknown_model(run_step):
    run_step(1, model="resnet").assert_one_sentence("unknown model 'resnet'", "reactnet_a")


def test_batch_that_does_not_divide(run_step, monkeypatch, image_folder):
    from utils.run.config import parse_config
    from utils.data import open_images, train_loader
    from utils.run.distributed import DistEnv
    from utils.run.errors import UserError

    config = parse_config(
        Path("step1/config.yaml").absolute(), ["--data", str(image_folder), "--batch_size", "9"]
    )
    process = DistEnv(0, 0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="batch_size 9 is the global batch and cannot be divided"):
        images, _ = open_images(config, process)
        train_loader(images, config, process)


def test_fewer_images_than_processes(image_folder):
    from utils.run.config import parse_config
    from utils.data import open_images, train_loader
    from utils.run.distributed import DistEnv
    from utils.run.errors import UserError

    arguments = ["--data", str(image_folder), "--train_per_class", "1", "--batch_size", "16"]
    config = parse_config(Path("step1/config.yaml").absolute(), arguments)
    process = DistEnv(0, 0, 4, torch.device("cpu"))
    images, _ = open_images(config, process)
    with pytest.raises(UserError, match="3 training images are fewer than the 4 processes"):
        train_loader(images, config, process)


def test_a_teacher_that_cannot_compute_the_image_size(run_step, monkeypatch):
    monkeypatch.setattr("models.teacher._build", lambda *_: torch.nn.Conv2d(3, 3, 99))
    result = run_step(1, teacher="resnet18")
    result.assert_one_sentence("the teacher resnet18 cannot compute images of 16 pixels", "Kernel")


def test_folder_that_cannot_be_written(run_step, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    run_step(1, save=file / "out").assert_one_sentence(f"cannot write to {file}/out", "--save")
    run_step(1, save="/proc/out").assert_one_sentence("cannot write to /proc/out")
    assert file.read_text() == "in the way"


def test_tensorboard_holds_the_scalars(run_step, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_step(1)
    events = EventAccumulator(str(tmp_path / "step1" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"learning_rate", "train_loss", "val_top1", "val_top5"} <= scalars
    assert "train_images_per_second" in scalars
    assert [event.step for event in events.Scalars("val_top1")] == [0, 1]
