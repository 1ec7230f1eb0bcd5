"""Loading JPEGs of about ImageNet's size, which are made here, by decoder, resizing and workers.

    python -m scripts.benchmarks loader --batch_size 64 --decoder pil nvimagecodec
    python -m scripts.benchmarks workers --batch_size 256 --workers 0 1 2 --resize pil torch

`loader` is what one worker does, beside the released transforms; `workers` is the loader of a
training run.  A round loads --batch_size images, in batches of 8.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.datasets.folder import pil_loader

from scripts.benchmarks import timing
from scripts.benchmarks.training import step2_config
from utils.data.dataset import open_train_images
from utils.data.decode import DECODERS
from utils.data.loader import train_loader
from utils.data.reference import train_transform
from utils.data.transforms import RESIZE
from utils.run.command_line import Parser
from utils.run.distributed import DistEnv

SINGLE_PROCESS = DistEnv(0, 0, 1, torch.device("cpu"))
LOADED = 8  # images of a batch


def add_options(parser: Parser) -> None:
    timing.add_comparison_options(parser)
    parser.add_argument("--decoder", choices=DECODERS, nargs="+", default=["pil"])
    parser.add_argument("--resize", choices=RESIZE, nargs="+", default=["pil"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of `workers`")


def run(what: str, arguments: argparse.Namespace) -> None:
    choices = list(product(arguments.decoder, arguments.resize))
    workers = arguments.workers if what == "workers" else ()
    images, size = arguments.batch_size, arguments.image_size
    timing.report(compare(images, size, arguments.rounds, choices, workers), arguments)


def compare(
    images: int,
    image_size: int,
    rounds: int,
    choices: Sequence[tuple[str, str]],
    workers: Sequence[int],
) -> dict:
    """Time loading so many images, by decoder and resizing, as `timing.describe` takes it.

    Args:
        workers: numbers of loading processes; none compares what one of them does with the
            released transforms.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder) / "train" / "clouds", images)
        config = step2_config(image_size, data=folder, batch_size=LOADED)
        released = train_transform(image_size, config.crop_scale)
        sides = {} if workers else {"reference": partial(load, paths, pil_loader, released)}
        for decoder, resize in choices:
            config = replace(config, decoder=decoder, resize=resize)
            dataset = open_train_images(config, SINGLE_PROCESS)
            name = f"decoder {decoder}, resize {resize}"
            for number in workers:
                batches = train_loader(dataset, replace(config, workers=number), SINGLE_PROCESS)
                sides[f"{name}, workers {number}"] = partial(exhaust, batches)
            if not workers:
                sides[name] = partial(load, paths, dataset.images.loader, dataset.transform)
        size = sum(path.stat().st_size for path in paths) / images / 1e3
        notes = {"mean file, KB": dict.fromkeys(sides, size)}
        return {"seconds": timing.interleaved(sides, rounds), "notes": notes}


def load(paths: Sequence[Path], read: Callable, transform: Callable) -> None:
    torch.manual_seed(0)  # the same crops on all sides
    for start in range(0, len(paths), LOADED):
        default_collate([transform(read(path)) for path in paths[start : start + LOADED]])


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


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
