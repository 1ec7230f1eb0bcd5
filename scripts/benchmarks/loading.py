"""Loading JPEGs of about ImageNet's size, which are made here, by decoder, resizing and workers."""

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.datasets.folder import pil_loader

from scripts.benchmarks.timing import interleaved
from scripts.benchmarks.training import step2_config
from utils.data.dataset import open_train_images
from utils.data.loader import train_loader
from utils.data.reference import train_transform
from utils.data.transforms import normalize_batch
from utils.run.distributed import DistEnv

SINGLE_PROCESS = DistEnv(0, 1, torch.device("cpu"))
LOADED = 8  # images of a batch


def compare(
    images: int,
    image_size: int,
    rounds: int,
    choices: Sequence[tuple[str, str]],
    workers: Sequence[int],
) -> dict[str, list[float]]:
    """Seconds of loading so many images in batches of 8, side -> rounds.

    Args:
        choices: decoder and resizing of each side.
        workers: numbers of loading processes; none compares what one of them does with the
            released transforms.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder) / "train" / "clouds", images)
        config = step2_config(image_size, data=folder, batch_size=LOADED)
        released = train_transform(image_size, config.crop_scale)
        as_it_is = partial(load, paths, pil_loader, released, default_collate)
        sides = {} if workers else {"reference": as_it_is}
        for decoder, resize in choices:
            config = replace(config, decoder=decoder, resize=resize)
            dataset = open_train_images(config)
            name = f"decoder {decoder}, resize {resize}"
            for number in workers:
                batches = train_loader(dataset, replace(config, workers=number), SINGLE_PROCESS)
                sides[f"{name}, workers {number}"] = partial(deque, batches, maxlen=0)  # keeps none
            if not workers:
                sides[name] = partial(
                    load, paths, dataset.images.loader, dataset.transform, normalized
                )
        return interleaved(sides, rounds)


def load(paths: Sequence[Path], read: Callable, transform: Callable, collate: Callable) -> None:
    torch.manual_seed(0)  # the same crops on all sides
    for start in range(0, len(paths), LOADED):
        collate([transform(read(path)) for path in paths[start : start + LOADED]])


def normalized(images: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return normalize_batch(*default_collate(images))


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """500 x 375 pixels of clouds and grain, around 100 KB as ImageNet's files are."""
    folder.mkdir(parents=True)
    paths = [folder / f"{seed:04}.jpg" for seed in range(count)]
    for seed, path in enumerate(paths):
        random = np.random.default_rng(seed)
        clouds = Image.fromarray(random.integers(0, 255, (47, 63, 3), dtype=np.uint8))
        pixels = np.array(clouds.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = pixels + random.normal(0, 9, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return paths
