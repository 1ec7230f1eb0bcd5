"""Image data sets whose augmentation is a function of (seed, epoch, image index) alone.

So a batch is the same for any number of loading workers and, taken together, of processes, and a
run that goes on needs no state of a loader.
"""

import contextlib
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.datasets import CIFAR10, ImageFolder

from utils.data.decode import CroppedImage, nvimagecodec, whole_image
from utils.data.image_folder import open_image_folder
from utils.data.shapes import write_shapes
from utils.data.transforms import TrainTransform, ValTransform, bytes_of, normalize_batch
from utils.run.command_line import printable
from utils.run.config import Config
from utils.run.errors import UserError


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(eq=False)
class SeededDataset(Dataset):
    """Item (epoch, index) is image `index`, augmented as a function of (seed, epoch, index).

    An item is (bytes (S, S, 3), channel shifts (3,), label).

    Args:
        images: a torchvision data set giving (image, label).
        transform: as `TrainTransform`; its randomness may come from torch's generator only.
        per_class: only the first so many images of each class; None takes all.
        skip: so many images may be unreadable; each is replaced by the next one that is not.
    """

    images: ImageFolder | CIFAR10
    transform: Callable
    seed: int = 0
    per_class: int | None = None
    skip: int = 0

    def __post_init__(self):
        self.classes: list[str] = self.images.classes
        self.chosen = _first_of_each_class(self.images.targets, self.per_class)
        # Shared with the loading workers, so that each image counts once.
        self.unreadable = torch.zeros(len(self.chosen), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        seed = mixed_seed(self.seed, epoch, index)
        while True:
            try:
                image, label = self.images[self.chosen[index]]
                # Without workers this is the training process, whose generator must not move.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    return *self.transform(image), label
            except UserError as error:
                if self.skip == 0:
                    raise
                self._count_unreadable(index, error)
            index = (index + 1) % len(self)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All images as they were read, (n, 3, side, side) bytes, and their labels (n,).

        Raises:
            UserError: they are not all squares of one size.
        """
        images = []
        for index in self.chosen:
            images.append(bytes_of(self.images[index][0]))
            height, width, _ = images[-1].shape
            if not height == width == len(images[0]):
                raise UserError(
                    "cache_images needs square images of one size, and one is"
                    f" {width} x {height} pixels: set it to false"
                )
        labels = torch.tensor([self.images.targets[index] for index in self.chosen])
        return torch.stack(images).permute(0, 3, 1, 2).contiguous(), labels

    def evenly_spaced(self, count: int) -> list[int]:
        """Up to `count` indices at even distances, which meet all of a folder's classes."""
        count = min(count, len(self))
        return [place * len(self) // count for place in range(count)]

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Images of epoch 0 as the network takes them, (n, 3, S, S), and their labels (n,)."""
        pixels, shifts, labels = default_collate([self[0, index] for index in indices])
        return normalize_batch(pixels, shifts), labels

    def _count_unreadable(self, index: int, error: UserError) -> None:
        if self.unreadable[index]:
            return
        self.unreadable[index] = True
        count = int(self.unreadable.sum())
        if count > self.skip:
            raise UserError(
                f"{count} images are unreadable and skip_unreadable is {self.skip}: {error}"
            )
        warning = printable(f"warning: {error}; replaced, {count} of {self.skip}")
        print(warning, file=sys.stderr, flush=True)


def _first_of_each_class(labels: Sequence[int], count: int | None) -> Sequence[int]:
    """Indices, in order, of the first `count` images of each class; all of them for None."""
    if count is None:
        return range(len(labels))
    places = defaultdict(list)
    for index, label in enumerate(labels):
        places[label].append(index)
    return sorted(index for of_class in places.values() for index in of_class[:count])


def open_train_images(config: Config) -> SeededDataset:
    """The training images alone."""
    return SeededDataset(
        _open_split(config, True),
        TrainTransform(config),
        config.seed,
        config.train_per_class,
        config.skip_unreadable,
    )


def open_val_images(config: Config) -> SeededDataset:
    """The validation images alone."""
    images = _open_split(config, False)
    return SeededDataset(images, ValTransform(config), per_class=config.val_per_class)


def _open_split(config: Config, train: bool) -> ImageFolder | CIFAR10:
    folder = Path(config.data)
    try:
        if config.data == "cifar10":
            return _cifar10(Path(config.cache_dir), train)
        if config.data == "shapes":
            folder = _shapes(Path(config.cache_dir))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get {config.data} into {config.cache_dir} ({error}):"
            " pass --cache_dir with a folder that can be written, or --data with your own"
        ) from error
    root = folder / ("train" if train else config.val_dir)
    if not root.is_dir():
        raise UserError(
            f"data folder {root} does not exist: pass --data with the folder that holds"
            f" train/<class>/ and {config.val_dir}/<class>/, or --data shapes for the built-in"
            " images"
        )
    return open_image_folder(root, _reader(config, train))


def _cifar10(cache: Path, train: bool) -> CIFAR10:
    with contextlib.suppress(RuntimeError):  # it is not there yet
        return CIFAR10(cache, train=train)
    with _lock(cache, "cifar10"):
        return CIFAR10(cache, train=train, download=True)


def _shapes(cache: Path) -> Path:
    folder = cache / "shapes"
    if not folder.exists():
        with _lock(cache, "shapes"):
            if not folder.exists():
                write_shapes(folder)
    return folder


def _lock(cache: Path, name: str) -> FileLock:
    """Several processes and programs may want a built-in data set at once."""
    cache.mkdir(parents=True, exist_ok=True)
    return FileLock(cache / f".{name}.lock")


# Runs that one process trains one after the other decode once.
_cached_image = functools.cache(whole_image)


def _reader(config: Config, train: bool) -> Callable[[str], Image.Image | CroppedImage]:
    if config.cache_images:
        return _cached_image
    if config.decoder == "pil" or not train:
        return whole_image
    nvimagecodec()  # so that a missing package is reported before training
    return CroppedImage
