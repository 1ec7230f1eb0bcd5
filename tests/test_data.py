"""Transforms, sampling and augmentation, and the built-in images."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, STEP1, TRAIN, VAL, dist_env
from PIL import Image
from torchvision import transforms
from torchvision.models import ResNet34_Weights

from utils.data.dataset import open_train_images, open_val_images
from utils.data.loader import EpochBatchSampler, build_loaders, val_batches
from utils.data.reference import train_transform
from utils.data.shapes import SHAPES, SIZE, draw_shape, write_shapes
from utils.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Lighting,
    TrainTransform,
    ValTransform,
    normalize_batch,
)
from utils.run.config import parse_config
from utils.run.distributed import DistEnv
from utils.run.errors import UserError

cached_or_not = pytest.mark.parametrize("cached", [False, True])
LIGHTING_SCALES = {"released": 1.0, "textbook": 255.0}


@pytest.fixture
def config(image_folder):
    small = ["--image_size", "16", "--val_resize", "16", "--batch_size", "8", "--workers", "0"]
    return parse_config(STEP1, ["--data", str(image_folder), *small])


def drawn(lighting: Lighting, count: int = 500) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.stack([lighting() for _ in range(count)])


def test_released_lighting_changes_a_channel_by_0_or_minus_1_with_the_increments_sign():
    torch.manual_seed(0)
    alphas = [torch.randn(3, dtype=torch.float64) * 0.1 for _ in range(500)]
    increments = torch.stack(alphas) * Lighting.EIGENVALUES @ Lighting.EIGENVECTORS.T
    shifts = drawn(Lighting())
    assert torch.equal(shifts, torch.where(increments < 0, -1, 0).to(torch.int16))
    assert set(shifts.unique().tolist()) == {-1, 0}


def test_textbook_lighting_has_the_published_standard_deviation():
    red = drawn(Lighting(scale=255.0), 4000)[:, 0].double()
    expected = 25.5 * (Lighting.EIGENVECTORS[0] * Lighting.EIGENVALUES).norm().item()
    assert abs(red.std().item() - expected) < 0.15


@pytest.mark.parametrize("lighting", ["released", "textbook"])
def test_what_the_network_sees_is_what_the_released_order_of_transforms_gives(config, lighting):
    config = replace(config, lighting=lighting)
    transform = TrainTransform(config)
    scale = LIGHTING_SCALES[lighting]
    whole = train_transform(config.image_size, config.crop_scale, scale)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 40, 3), np.uint8)
    pixels[0], pixels[1] = 0, 255
    for seed, image in enumerate(map(Image.fromarray, pixels)):
        torch.manual_seed(seed)
        ours = normalize_batch(*(part[None] for part in transform(image)))[0]
        torch.manual_seed(seed)
        assert torch.equal(ours, whole(image)) and ours.is_contiguous()


def test_without_lighting_bytes_stay_as_they_are(config):
    assert TrainTransform(replace(config, lighting="none")).lighting().tolist() == [0, 0, 0]


def test_default_validation_is_resize_256_crop_224_and_no_noise():
    transform = ValTransform(parse_config(STEP1, []))
    assert (transform.resize.size, transform.crop.size) == (256, (224, 224))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    whole = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    ours = normalize_batch(*(part[None] for part in transform(image)))[0]
    assert torch.equal(ours, whole(image))


def batches_of(config, workers: int, epoch: int, rank: int = 0, world_size: int = 1):
    config = replace(config, workers=workers)
    loader, _ = build_loaders(config, dist_env(rank, world_size))
    loader.set_epoch(epoch)
    return list(loader)


def test_order_and_augmentation_do_not_depend_on_the_number_of_workers(config):
    alone, helped = batches_of(config, 0, epoch=3), batches_of(config, 2, epoch=3)
    for (images, labels), (other_images, other_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_crops_of_whole_batches_are_pillows(config, size):
    transform = TrainTransform(
        replace(config, image_size=size, val_resize=size, lighting="textbook")
    )
    pixels = torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8)
    crops, flips, shifts = transform.draw(100, 32)
    ours = transform.crop_batch(pixels.permute(0, 3, 1, 2), crops, flips, shifts)
    singly = []
    for image, flip, crop in zip(pixels.numpy(), flips, crops.int().tolist(), strict=True):
        top, left, rows, columns = crop
        box = left, top, left + columns, top + rows
        single = transform.resize(Image.fromarray(image).crop(box), size)
        singly.append(single.flip(1) if flip else single)
    difference = ours - normalize_batch(torch.stack(singly), shifts)
    bytes_apart = (difference * 255 * torch.tensor(IMAGENET_STD)[:, None, None]).abs()
    assert bytes_apart.max() < (0.01 if size == 32 else 2.01)
    assert (bytes_apart > 0.01).float().mean() < 0.05


def test_crops_drawn_at_once_have_the_distribution_of_single_ones(config):
    transform = TrainTransform(replace(config, crop_scale=0.08))
    torch.manual_seed(0)
    crops, flips, _ = transform.draw(10_000, 32)
    left, top, right, bottom = torch.tensor([transform.box((32, 32)) for _ in range(10_000)]).T
    singly = torch.stack([top, left, bottom - top, right - left], 1).float()
    for moment in (torch.mean, torch.std):
        assert torch.allclose(moment(crops, 0), moment(singly, 0), atol=0.25)
    assert (crops[:, :2] + crops[:, 2:]).max() == 32 and crops[:, 2:].min() >= 1
    assert abs(flips.float().mean() - 0.5) < 0.02


def test_a_cached_data_set_is_read_once_and_cropped_anew_in_each_epoch(config, own_images):
    config = replace(config, data=str(own_images), crop_scale=0.5, workers=0)
    (plain, plain_val), (loader, val) = (
        build_loaders(replace(config, cache_images=cached), dist_env()) for cached in (False, True)
    )
    labels = [labels.tolist() for _, labels in plain]
    kept = list(plain_val)
    first, *_ = list(loader)
    for _ in range(2):
        for (images, _), (expected, _) in zip(val, kept, strict=True):
            assert torch.equal(images, expected)
        shutil.rmtree(own_images, ignore_errors=True)
    assert [labels.tolist() for _, labels in loader] == labels
    loader.set_epoch(1)
    index = loader.image_indices(0)[0]
    images = torch.cat([images for images, _ in loader])
    assert not any(torch.equal(image, images[0]) for image in first[0])
    assert torch.equal(loader.dataset.decoded()[0][index], loader.pixels[index])


def test_a_cached_data_set_of_several_sizes_is_refused(config, own_images):
    config = replace(config, data=str(own_images), cache_images=True)
    path = next(own_images.glob("train/*/*.png"))
    Image.open(path).resize((40, 40)).save(path)
    with pytest.raises(UserError, match=r"needs square images of one size, and one is \d+ x \d+ p"):
        build_loaders(config, dist_env())


def test_order_is_drawn_from_seed_and_epoch():
    def order(seed: int, epoch: int) -> list:
        batches = EpochBatchSampler(24, 8, seed, rank=0, world_size=1, epoch=epoch)
        return [index for batch in batches for _, index in batch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0) and order(0, 0) != order(0, 1)


@cached_or_not
def test_augmentation_is_drawn_from_seed_and_epoch(config, cached):
    def image(seed: int, epoch: int) -> torch.Tensor:
        own = replace(config, seed=seed, batch_size=len(CLASSES) * TRAIN, cache_images=cached)
        loader, _ = build_loaders(own, dist_env())
        loader.set_epoch(epoch)
        ((images, _),) = loader
        return images[loader.image_indices(0).index(0)]

    assert torch.equal(image(0, 0), image(0, 0))
    assert not torch.equal(image(0, 0), image(1, 0))
    assert not torch.equal(image(0, 0), image(0, 1))


@cached_or_not
def test_loading_leaves_the_training_generator_alone(config, cached):
    config = replace(config, cache_images=cached)
    torch.manual_seed(5)
    batches_of(config, 0, epoch=0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


@cached_or_not
def test_two_processes_together_load_the_batches_of_one(config, cached):
    config = replace(config, cache_images=cached)
    whole = batches_of(config, 0, epoch=1)
    shares = [batches_of(config, 0, 1, rank, world_size=2) for rank in (0, 1)]
    for (images, labels), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize(("length", "last"), [(24, 8), (19, 3), (17, 1)])
def test_every_image_is_trained_on_once_and_what_is_left_over_makes_the_last_batch(length, last):
    batches = list(EpochBatchSampler(length, 8, seed=0, rank=0, world_size=1))
    assert sorted(index for batch in batches for _, index in batch) == list(range(length))
    assert len(batches[-1]) == last


@pytest.mark.parametrize("length", [16, 17, 18, 19])
def test_all_processes_take_the_same_number_of_batches_and_none_is_empty(length):
    shares = [list(EpochBatchSampler(length, 8, 0, rank, world_size=2)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == len(EpochBatchSampler(length, 8, 0, 0, 2))
    assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_deals_out_each_image_once_in_batches_that_stay_the_same(world_size):
    dealt = [val_batches(21, 8, rank, world_size) for rank in range(world_size)]
    batches = sorted(batch for share in dealt for batch in share)
    assert batches == val_batches(21, 8, 0, 1)
    assert [index for batch in batches for _, index in batch] == list(range(21))


def test_a_number_per_class_takes_the_first_images_of_each_class(config):
    loaders = build_loaders(replace(config, train_per_class=3, val_per_class=2), dist_env())
    assert [loader.dataset.chosen for loader in loaders] == [
        [first + i for first in range(0, len(CLASSES) * images, images) for i in range(count)]
        for images, count in ((TRAIN, 3), (VAL, 2))
    ]
    labels = torch.cat([labels for _, labels in loaders[0]])
    assert sorted(labels.tolist()) == [0] * 3 + [1] * 3 + [2] * 3


def test_validation_folder_may_have_another_name(config, own_images):
    (own_images / "val").rename(own_images / "test")
    config = replace(config, data=str(own_images), val_dir="test")
    assert len(open_val_images(config)) == len(CLASSES) * VAL


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
    monkeypatch.setattr("utils.data.shapes._SPLITS", {"train": 2, "val": 1})
    config = replace(config, data="shapes", cache_dir=str(tmp_path))
    train, val = open_train_images(config), open_val_images(config)
    assert train.classes == list(SHAPES) and (len(train), len(val)) == (20, 10)
    assert train.images[0][0].size == (SIZE, SIZE)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    open_train_images(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == written


def test_interrupted_drawing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.shapes.draw_shape", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes(tmp_path / "shapes")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(config):
    config = replace(config, batch_size=9)
    with pytest.raises(UserError, match="batch_size 9 is the global batch and cannot be divided"):
        build_loaders(config, dist_env(world_size=2))


def test_fewer_images_than_processes_are_refused(config):
    config = replace(config, train_per_class=1)
    with pytest.raises(UserError, match="3 training images are fewer than the 4 processes"):
        build_loaders(config, dist_env(world_size=4))


@cached_or_not
def test_a_position_in_an_epoch_gives_the_batches_from_there_on(config, cached):
    config = replace(config, cache_images=cached)
    whole = batches_of(config, 0, epoch=2)
    loader, _ = build_loaders(config, dist_env())
    loader.set_epoch(2, start_batch=1)
    for (images, labels), (rest, rest_labels) in zip(whole[1:], loader, strict=True):
        assert torch.equal(images, rest) and torch.equal(labels, rest_labels)
    loader.set_epoch(3)
    assert len(list(loader)) == len(whole) == len(loader)
    seen = [index for batch in range(len(whole)) for index in loader.image_indices(batch)]
    assert sorted(seen) == list(range(len(loader.dataset)))


def test_batches_are_those_of_a_plain_copy_also_while_the_device_is_busy(config, device):
    (plain, _), (loader, _) = (
        build_loaders(config, DistEnv(0, 1, place)) for place in (torch.device("cpu"), device)
    )
    seen = []
    for images, labels in loader:
        if images.is_cuda:
            torch.cuda._sleep(10**8)  # the next batches arrive before these are read
        seen.append((images * 1, labels * 1))
        del images, labels
    for mine, parts in zip(seen, plain.loader, strict=True):
        pixels, shifts, labels = (part.to(device) for part in parts)
        assert torch.equal(mine[0], normalize_batch(pixels, shifts))
        assert torch.equal(mine[1], labels)


def test_images_are_normalised_as_torchvisions_networks_expect():
    preset = ResNet34_Weights.IMAGENET1K_V1.transforms()
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (preset.mean, preset.std)
