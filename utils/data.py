"""Images: data sets, the released transforms, and loaders that do not depend on their workers.

Loading ends with bytes, a pixel's three side by side as in Pillow; colour planes, colour noise and
normalisation are made of whole batches, on the device that trains, with the very numbers that the
released order of transforms gives.

Which images a batch holds and how each is augmented is a function of (seed, epoch, image index)
alone: the same for any number of loading workers, and, together, for any number of processes.
"""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import resize

from utils.command_line import printable
from utils.config import Config
from utils.decoding import CroppedImage, nvimagecodec, undecodable, whole_image
from utils.distributed import Process, first_on_each_machine
from utils.errors import InputError
from utils.files import is_folder
from utils.folders import ImageFolder
from utils.shapes import write_shapes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Lighting:
    """PCA colour noise (Krizhevsky et al. 2012): draws what to add to each channel's bytes.

    increment = V (alpha * lambda), alpha ~ Normal(0, std) per component.  The eigenvalues belong
    to the 0-1 scale.  With `scale=1`, the released code, the increment is added on the 0-255
    scale and truncated, so that a channel changes by 0 or -1 only; `scale=255` is the textbook.
    Truncating byte + increment is adding the increment's floor, the whole number returned.
    """

    EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
    EIGENVECTORS = torch.tensor(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ],
        dtype=torch.float64,
    )

    def __init__(self, std: float = 0.1, scale: float = 1.0):
        self.std = std
        self.scale = scale

    def __call__(self) -> torch.Tensor:
        """(3,) int16."""
        alpha = torch.randn(3, dtype=torch.float64) * self.std
        increment = self.scale * (self.EIGENVECTORS @ (alpha * self.EIGENVALUES))
        return increment.floor().to(torch.int16)


def no_lighting() -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int16)


LIGHTING = {"released": Lighting(scale=1.0), "textbook": Lighting(scale=255.0), "none": no_lighting}


class ImageSizes(Protocol):
    """Pixels of an image for a network, and of its shorter side before the central crop."""

    image_size: int
    val_resize: int


def bytes_of(image: Image.Image | np.ndarray) -> Tensor:
    """An RGB image or its bytes -> a tensor of its own, (height, width, 3)."""
    return torch.from_numpy(np.array(image))


def resized_by_pillow(crop: Image.Image | np.ndarray, size: int) -> Tensor:
    """Antialiased bilinear, as released: an RGB image or its bytes -> bytes (size, size, 3)."""
    image = crop if isinstance(crop, Image.Image) else Image.fromarray(crop)
    return bytes_of(image.resize((size, size), Image.Resampling.BILINEAR))


def resized_by_torch(crop: Image.Image | np.ndarray, size: int) -> Tensor:
    """The same filter with coefficients of 16 bits: a byte may differ, by at most 2."""
    pixels = resize(bytes_of(crop).permute(2, 0, 1), [size, size], antialias=True)
    return pixels.permute(1, 2, 0).contiguous()


RESIZE = {"pil": resized_by_pillow, "torch": resized_by_torch}


class TrainTransform:
    """RGB image -> its bytes (size, size, 3), and what Lighting adds to each channel, (3,).

    Randomness is drawn in the released order, crop, lighting, flip; flipping a channel and adding
    to it commute.  Of a `CroppedImage` no more than the crop is decoded.
    """

    def __init__(self, config: Config):
        self.crop = transforms.RandomResizedCrop(config.image_size, scale=(config.crop_scale, 1.0))
        self.size = config.image_size
        self.resize = RESIZE[config.resize]
        self.lighting = LIGHTING[config.lighting]

    def __call__(self, image: Image.Image | CroppedImage) -> tuple[Tensor, Tensor]:
        pixels = self.resize(image.crop(self.box(image.size)), self.size)
        shift = self.lighting()
        flips = torch.rand(1) < 0.5
        return pixels.flip(1) if flips else pixels, shift

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """A random crop of an image of (width, height): left, top, right, bottom."""
        width, height = size
        shape = torch.empty(3, height, width, device="meta")
        top, left, rows, columns = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
        return left, top, left + columns, top + rows


class ValTransform:
    """Resize the shorter side, crop the centre: PIL image -> as `TrainTransform`, without noise."""

    def __init__(self, sizes: ImageSizes):
        self.resize = transforms.Resize(sizes.val_resize)
        self.crop = transforms.CenterCrop(sizes.image_size)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return bytes_of(self.crop(self.resize(image))), no_lighting()


def network_input(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Bytes (n, S, S, 3) and channel shifts (n, 3) -> normalised floats (n, 3, S, S)."""
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    if shifts.is_cuda or shifts.any():
        pixels = (pixels.to(torch.int16) + shifts[:, :, None, None]).clamp_(0, 255)
    mean, std = (torch.tensor(x, device=pixels.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class SeededImages(Dataset):
    """Item (epoch, index) is image `index`, augmented as a function of (seed, epoch, index).

    An item is (bytes (S, S, 3), channel shifts (3,), label).

    Args:
        images: a torchvision data set giving (image, label).
        transform: as `TrainTransform`; its randomness may come from torch's generator only.
        per_class: only the first so many images of each class; None takes all.
        skip: so many images may be unreadable; each is replaced by the next one that is not.
    """

    def __init__(
        self,
        images: ImageFolder | CIFAR10,
        transform,
        seed: int = 0,
        per_class: int | None = None,
        skip: int = 0,
    ):
        self.images = images
        self.transform = transform
        self.seed = seed
        self.classes: list[str] = images.classes
        self.chosen = _first_of_each_class(images.targets, per_class)
        self.skip = skip
        # Shared with the loading workers, so that each image counts once.
        self.unreadable = torch.zeros(len(self.chosen), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        seed = mixed_seed(self.seed, epoch, index)
        while True:
            try:
                return self._augmented(self.chosen[index], seed)
            except InputError as error:
                if self.skip == 0:
                    raise
                self._count_unreadable(index, error)
            index = (index + 1) % len(self)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Images of epoch 0 as the network takes them, (n, 3, S, S), and their labels (n,)."""
        pixels, shifts, labels = default_collate([self[0, index] for index in indices])
        return network_input(pixels, shifts), labels

    def _augmented(self, index: int, seed: int) -> tuple[Tensor, Tensor, int]:
        image, label = self._opened(index)
        # Without workers this runs in the training process, whose generator must not move.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return *self.transform(image), label

    def _count_unreadable(self, index: int, error: InputError) -> None:
        if self.unreadable[index]:
            return
        self.unreadable[index] = True
        count = int(self.unreadable.sum())
        if count > self.skip:
            raise InputError(
                f"{count} images are unreadable and skip_unreadable is {self.skip}: {error}"
            )
        warning = printable(f"warning: {error}; replaced, {count} of {self.skip}")
        print(warning, file=sys.stderr, flush=True)

    def _opened(self, index: int) -> tuple[Image.Image | CroppedImage, int]:
        try:
            return self.images[index]
        except Exception as error:  # PIL raises many types for a file it cannot decode
            where = getattr(self.images, "samples", {index: (index,)})[index][0]
            raise undecodable(where, error) from error


def _first_of_each_class(labels: Sequence[int], count: int | None) -> Sequence[int]:
    """Indices, in order, of the first `count` images of each class; all of them for None."""
    if count is None:
        return range(len(labels))
    seen = Counter()
    chosen = []
    for index, label in enumerate(labels):
        if seen[label] < count:
            seen[label] += 1
            chosen.append(index)
    return chosen


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """One process's share of each batch of a permutation drawn from (seed, epoch).

    The shares of all processes, in rank order, are the batch one process alone would see.  The
    last batch keeps what is left over, as released; when that is less than one image for each
    process it is left out.  Set `epoch` before each iteration, and `first` to skip what a run that
    goes on within the epoch has had: the order is drawn anew, so its position is that one number.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(self.length, self.batch_size)
        return whole + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.whole_batches()[self.first : len(self)]:
            share = batch.tensor_split(self.world_size)[self.rank]
            yield [(self.epoch, index) for index in share.tolist()]

    def whole_batches(self) -> tuple[torch.Tensor, ...]:
        """The epoch's batches over all processes: image indices, `batch_size` in each."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator).split(self.batch_size)


def val_batches(length: int, batch_size: int, rank: int, world_size: int):
    """Whole batches dealt out in turn: each image once, and no batch depends on `world_size`."""
    batches = torch.arange(length).split(batch_size)[rank::world_size]
    return [[(0, index) for index in batch.tolist()] for batch in batches]


def open_images(config: Config, process: Process) -> tuple[SeededImages, SeededImages]:
    """The training and the validation images that `config.data` names.

    Raises:
        InputError: a missing or empty folder, classes that differ, or a failed download.
    """
    train = open_train_images(config, process)
    val = open_val_images(config, process)
    if train.classes != val.classes:
        raise InputError(
            f"{config.data}: {len(train.classes)} classes to train on,"
            f" {len(val.classes)} to validate on, and they must be the same;"
            f" only in one: {', '.join(sorted({*train.classes} ^ {*val.classes})[:3])}"
        )
    return train, val


def open_train_images(config: Config, process: Process) -> SeededImages:
    """The training images alone."""
    return SeededImages(
        _open_split(config, process, True),
        TrainTransform(config),
        config.seed,
        config.train_per_class,
        config.skip_unreadable,
    )


def open_val_images(config: Config, process: Process) -> SeededImages:
    """The validation images alone."""
    images = _open_split(config, process, False)
    return SeededImages(images, ValTransform(config), per_class=config.val_per_class)


def _open_split(config: Config, process: Process, train: bool) -> ImageFolder | CIFAR10:
    with first_on_each_machine(process):
        if config.data == "cifar10":
            return _cifar10(config, train)
        folder = Path(config.data)
        if config.data == "shapes":
            folder = Path(config.cache_dir) / "shapes"
            _draw_shapes(folder)
        if train:
            return _image_folder(folder, "train", _reader(config.decoder))
        return _image_folder(folder, config.val_dir, whole_image)


def _reader(decoder: str) -> Callable[[str], Image.Image | CroppedImage]:
    if decoder == "pil":
        return whole_image
    nvimagecodec()  # so that a missing package is told before training
    return CroppedImage


def _image_folder(folder: Path, split: str, read: Callable) -> ImageFolder:
    root = folder / split
    if not is_folder(root):
        raise InputError(
            f"data folder {root} does not exist: pass --data with the folder that holds"
            f" train/<class>/ and {split if split != 'train' else 'val'}/<class>/,"
            " or --data shapes for the built-in images"
        )
    return ImageFolder(root, loader=read)


def _cifar10(config: Config, train: bool) -> CIFAR10:
    try:
        return CIFAR10(config.cache_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot get CIFAR-10 into {config.cache_dir}: {error}") from error


def _draw_shapes(folder: Path) -> None:
    try:
        write_shapes(folder)
    except OSError as error:
        raise InputError(
            f"cannot write the built-in images to {folder} ({error.strerror}):"
            " pass --cache_dir with a folder that can be written"
        ) from error


class DeviceBatches:
    """A loader's batches as (n, 3, S, S) network inputs and (n,) labels on the device.

    On a GPU each is copied and normalised on a stream of its own while the one before is computed.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader = loader
        self.batch_sampler = loader.batch_sampler
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.device.type != "cuda":
            for pixels, shifts, labels in self.loader:
                yield network_input(pixels, shifts), labels
            return
        copying = torch.cuda.Stream(self.device)
        computing = torch.cuda.current_stream(self.device)
        ready = None
        for batch in self.loader:
            with torch.cuda.stream(copying):
                pixels, shifts, labels = (part.to(self.device, non_blocking=True) for part in batch)
                coming = network_input(pixels, shifts), labels
            if ready is not None:
                yield ready
            computing.wait_stream(copying)
            for part in coming:
                part.record_stream(computing)
            ready = coming
        if ready is not None:
            yield ready


def train_loader(images: SeededImages, config: Config, process: Process) -> DeviceBatches:
    """Batches for training; the global batch is `config.batch_size`.

    Raises:
        InputError: the global batch cannot be divided over the processes, or there are fewer images
            than processes.
    """
    if config.batch_size % process.world_size:
        raise InputError(
            f"batch_size {config.batch_size} is the global batch and cannot be divided over"
            f" {process.world_size} processes: choose a multiple of {process.world_size}"
        )
    batches = TrainBatches(
        len(images), config.batch_size, config.seed, process.rank, process.world_size
    )
    if len(batches) == 0:
        raise InputError(
            f"{len(images)} training images are fewer than the {process.world_size} processes that"
            " share them: start fewer processes"
        )
    return _loader(images, batches, config, process)


def val_loader(images: SeededImages, config: Config, process: Process) -> DeviceBatches:
    """This process's validation batches, each of `config.batch_size` images but the last."""
    batches = val_batches(len(images), config.batch_size, process.rank, process.world_size)
    return _loader(images, batches, config, process)


def _loader(images: SeededImages, batches, config: Config, process: Process) -> DeviceBatches:
    # More workers than cores only wait for each other, and no result depends on their number.
    workers = min(config.workers, _usable_cores())
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=answer_parent_alone,
        # Its own generator: the loader's seed for its workers is drawn, and nothing here uses it.
        generator=torch.Generator(),
    )
    return DeviceBatches(loader, process.device)


def answer_parent_alone(worker: int) -> None:
    """Let a loading worker live as long as its training process, which is the one to get signals.

    A scheduler sends SIGTERM to all processes; a worker must still load the batch that the training
    process finishes before it leaves.  From that process itself, SIGTERM ends the worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere than on Linux SIGTERM ends workers as well
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


def _usable_cores() -> int:
    """Those a scheduler left to this process, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
