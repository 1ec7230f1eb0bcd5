"""Transforms, sampling and augmentation, the built-in images, and folders that cannot be used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, TRAIN, VAL, write_images
from PIL import Image

from utils import data
from utils.command_line import one_sentence
from utils.config import parse_config
from utils.data import Lighting, SeededImages, TrainBatches, open_images, train_loader, val_loader
from utils.distributed import Process
from utils.errors import InputError
from utils.shapes import SHAPES, SIZE, draw_shape, write_shapes

STEP1 = Path(__file__).parents[1] / "step1" / "config.yaml"


def process(rank: int = 0, world_size: int = 1) -> Process:
    return Process(rank, rank, world_size, torch.device("cpu"))


@pytest.fixture
def config(image_folder):
    small = ["--image_size", "16", "--val_resize", "16", "--batch_size", "8", "--workers", "0"]
    return parse_config(STEP1, ["--data", str(image_folder), *small])


def grey(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), value, np.uint8))


def test_released_lighting_changes_a_channel_by_0_or_minus_1_with_the_increments_sign():
    torch.manual_seed(0)
    increments = (torch.randn(200, 3).double() * 0.1 * Lighting.EIGENVALUES) @ (
        Lighting.EIGENVECTORS.T
    )
    torch.manual_seed(0)
    alphas = torch.randn(200, 3).double()
    lighting = Lighting()
    for alpha, increment in zip(alphas, increments, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, alpha=alpha, **__: alpha)
            changed, black = lighting(grey(128)), lighting(grey(0))
        expected = [127 if channel < 0 else 128 for channel in increment]
        assert changed.getpixel((0, 0)) == tuple(expected)
        assert black.getpixel((0, 0)) == (0, 0, 0)


def test_textbook_lighting_has_the_published_standard_deviation():
    torch.manual_seed(0)
    lighting = Lighting(scale=255.0)
    red = [lighting(grey(128)).getpixel((0, 0))[0] for _ in range(2000)]
    vectors, values = Lighting.EIGENVECTORS, Lighting.EIGENVALUES
    expected = 255 * 0.1 * (vectors[0] * values).norm().item()
    assert abs(np.std(red) - expected) < 0.15


def test_training_transform_has_the_released_order_and_lighting_is_an_option(config):
    names = [type(t).__name__ for t in data.train_transform(config).transforms]
    assert names == [
        "RandomResizedCrop", "Lighting", "RandomHorizontalFlip", "ToTensor", "Normalize",
    ]  # fmt: skip
    without = data.train_transform(replace(config, lighting="none")).transforms
    assert len(without) == 4


def test_default_validation_transform_is_resize_256_crop_224():
    config = parse_config(STEP1, [])
    resize, crop, *_ = data.val_transform(config).transforms
    assert (resize.size, crop.size) == (256, (224, 224))


def batches_of(config, workers: int, epoch: int, rank: int = 0, world_size: int = 1):
    config = replace(config, workers=workers)
    images, _ = open_images(config, process())
    loader = train_loader(images, config, process(rank, world_size))
    loader.batch_sampler.epoch = epoch
    return list(loader)


def test_order_and_augmentation_do_not_depend_on_the_number_of_workers(config):
    alone, helped = batches_of(config, 0, epoch=3), batches_of(config, 2, epoch=3)
    for (images, labels), (other_images, other_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_order_and_augmentation_change_with_epoch_and_seed(config):
    images = [
        batches_of(replace(config, seed=seed), 0, epoch)[0][0]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_order_is_drawn_from_seed_and_epoch():
    def order(seed: int, epoch: int) -> list:
        batches = TrainBatches(24, 8, seed, rank=0, world_size=1)
        batches.epoch = epoch
        return [index for batch in batches for _, index in batch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0) and order(0, 0) != order(0, 1)


def test_loading_leaves_the_training_generator_alone(config):
    torch.manual_seed(5)
    batches_of(config, 0, epoch=0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_two_processes_together_load_the_batches_of_one(config):
    whole = batches_of(config, 0, epoch=1)
    shares = [batches_of(config, 0, 1, rank, world_size=2) for rank in (0, 1)]
    for (images, labels), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize(("length", "last"), [(24, 8), (19, 3), (17, 1)])
def test_every_image_is_trained_on_once_and_what_is_left_over_makes_the_last_batch(length, last):
    batches = list(TrainBatches(length, 8, seed=0, rank=0, world_size=1))
    assert sorted(index for batch in batches for _, index in batch) == list(range(length))
    assert len(batches[-1]) == last


@pytest.mark.parametrize("length", [16, 17, 18, 19])
def test_all_processes_take_the_same_number_of_batches_and_none_is_empty(length):
    shares = [list(TrainBatches(length, 8, 0, rank, world_size=2)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == len(TrainBatches(length, 8, 0, 0, 2))
    assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_deals_out_each_image_once_in_batches_that_stay_the_same(world_size):
    dealt = [data.val_batches(21, 8, rank, world_size) for rank in range(world_size)]
    batches = sorted(batch for share in dealt for batch in share)
    assert batches == data.val_batches(21, 8, 0, 1)
    assert [index for batch in batches for _, index in batch] == list(range(21))


def test_both_splits_are_read_whole(config):
    train, val = open_images(config, process())
    assert (len(train), len(val)) == (len(CLASSES) * TRAIN, len(CLASSES) * VAL)
    assert sum(len(labels) for _, labels in val_loader(val, config, process())) == len(val)


def test_a_number_per_class_takes_the_first_images_of_each_class(config):
    train, val = open_images(replace(config, train_per_class=3, val_per_class=2), process())
    assert [train.chosen, val.chosen] == [
        [first + i for first in range(0, len(CLASSES) * images, images) for i in range(count)]
        for images, count in ((TRAIN, 3), (VAL, 2))
    ]
    labels = [label for batch in train_loader(train, config, process()) for label in batch[1]]
    assert sorted(map(int, labels)) == [0] * 3 + [1] * 3 + [2] * 3


def test_validation_folder_may_have_another_name(config, tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "val").rename(folder / "test")
    _, val = open_images(replace(config, data=str(folder), val_dir="test"), process())
    assert len(val) == len(CLASSES) * VAL


def test_built_in_drawings_are_the_same_every_time_and_differ_from_each_other():
    drawings = [
        draw_shape(split, name, index).tobytes()
        for split in ("train", "val")
        for name in SHAPES
        for index in range(3)
    ]
    assert len(set(drawings)) == len(drawings) == 2 * len(SHAPES) * 3
    assert drawings[0] == draw_shape("train", next(iter(SHAPES)), 0).tobytes()


def test_built_in_images_are_written_once_as_an_image_folder(config, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.shapes._SPLITS", {"train": 2, "val": 1})
    config = replace(config, data="shapes", cache_dir=str(tmp_path))
    train, val = open_images(config, process())
    assert train.classes == list(SHAPES) and (len(train), len(val)) == (20, 10)
    assert train.images[0][0].size == (SIZE, SIZE)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    open_images(config, process())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == written


def test_interrupted_drawing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.shapes.draw_shape", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes(tmp_path / "shapes")
    assert not list(tmp_path.iterdir())


def test_undecodable_image_is_named_also_from_a_worker(config, tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "train" / "disc" / "3.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(InputError) as caught:
            batches_of(replace(config, data=str(folder)), workers, epoch=0)
        sentence = one_sentence(caught.value)
        assert sentence.startswith(f"cannot decode image {folder}/train/disc/3.png")
        assert "\n" not in sentence


def test_transform_must_use_torchs_generator_to_be_repeatable(image_folder):
    images = SeededImages(data.ImageFolder(image_folder / "train"), lambda _: torch.rand(2), 7)
    assert torch.equal(images[1, 2][0], images[1, 2][0])
    assert not torch.equal(images[1, 2][0], images[2, 2][0])
