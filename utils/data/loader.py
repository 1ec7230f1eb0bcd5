"""Loaders: which images make a batch, and their way to the device."""

import functools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from utils.data.dataset import SeededDataset, mixed_seed, open_train_images, open_val_images
from utils.data.transforms import normalize_batch
from utils.run.config import Config
from utils.run.distributed import DistEnv
from utils.run.errors import UserError, WorkerLost

Key = tuple[int, int]  # epoch and image index, of a SeededDataset
SHARED_MEMORY = Path("/dev/shm")  # where workers leave their batches, on Linux
PREFETCH = 2  # batches that each worker has ready
FILE_HANDLES = 10240  # the most that macOS grants, and enough for hundreds of workers


def build_loaders(config: Config, dist: DistEnv) -> tuple["PrefetchLoader", "PrefetchLoader"]:
    """The training and the validation batches of this process.

    Raises:
        UserError: a missing or empty folder, classes that differ, a failed download, or a batch
            that cannot be divided over the processes.
    """
    train, val = open_train_images(config), open_val_images(config)
    if train.classes != val.classes:
        raise UserError(
            f"{config.data}: {len(train.classes)} classes to train on, {len(val.classes)} to"
            " validate on, and they must be the same;"
            f" only in one: {', '.join(sorted({*train.classes} ^ {*val.classes})[:3])}"
        )
    return train_loader(train, config, dist), val_loader(val, config, dist)


def train_loader(images: SeededDataset, config: Config, dist: DistEnv) -> "PrefetchLoader":
    """Batches for training; the global batch is `config.batch_size`.

    Raises:
        UserError: the global batch cannot be divided over the processes, or there are fewer images
            than processes, or too little shared memory.
    """
    if config.batch_size % dist.world_size:
        raise UserError(
            f"batch_size {config.batch_size} is the global batch and cannot be divided over"
            f" {dist.world_size} processes: choose a multiple of {dist.world_size}"
        )
    sampler = EpochBatchSampler(
        len(images), config.batch_size, config.seed, dist.rank, dist.world_size
    )
    if len(sampler) == 0:
        raise UserError(
            f"{len(images)} training images are fewer than the {dist.world_size} processes that"
            " share them: start fewer processes"
        )
    if config.cache_images:
        return CachedLoader(images, sampler, 0, dist.device)
    check_workers(config, config.batch_size // dist.world_size)
    return PrefetchLoader(images, sampler, config.workers, dist.device)


def val_loader(images: SeededDataset, config: Config, dist: DistEnv) -> "PrefetchLoader":
    """This process's validation batches, each of `config.batch_size` images but the last.

    Raises:
        UserError: too little shared memory.
    """
    batches = val_batches(len(images), config.batch_size, dist.rank, dist.world_size)
    if config.cache_images:
        return KeptBatches(images, batches, 0, dist.device)
    check_workers(config, config.batch_size)
    return PrefetchLoader(images, batches, config.workers, dist.device)


def check_workers(config: Config, batch_size: int) -> None:
    """Raise UserError for too little shared memory or too few file handles for loading workers."""
    workers = loading_workers(config.workers)
    if workers:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        batches = processes * (workers * PREFETCH + 1)
        _check_shared_memory(workers, batches * batch_size * 3 * config.image_size**2)
        _allow_file_handles(workers)


def _check_shared_memory(workers: int, needed: int) -> None:
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else needed
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and the batches of {workers} loading"
            f" workers a process need {needed / 1e6:.0f} MB: give the container more (docker run"
            " --shm-size=8g), or pass a smaller --workers or --batch_size; --workers 0 needs none"
        )


def _allow_file_handles(workers: int) -> None:
    if os.name != "posix":
        return
    needed = 64 + 12 * workers  # measured: up to 11 a worker, in training and validation together
    import resource  # which Windows does not have

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, min(hard, FILE_HANDLES))
    if limit < needed:
        raise UserError(
            f"{limit} open files are allowed (ulimit -n), and {workers} loading workers may need"
            f" {needed}: allow more, or pass a smaller --workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@dataclass
class EpochBatchSampler(Sampler[list[Key]]):
    """One process's share of each batch of a permutation drawn from (seed, epoch).

    The shares of all processes, in rank order, are the batch one process alone would see.  The
    last batch keeps what is left over, as released; when that is less than one image for each
    process it is left out.
    """

    length: int
    batch_size: int
    seed: int
    rank: int
    world_size: int
    epoch: int = 0
    start_batch: int = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(self.length, self.batch_size)
        return whole + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.global_batches()[self.start_batch : len(self)]:
            share = batch.tensor_split(self.world_size)[self.rank]
            yield [(self.epoch, index) for index in share.tolist()]

    def global_batches(self) -> tuple[Tensor, ...]:
        """The epoch's batches over all processes: image indices, `batch_size` in each."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator).split(self.batch_size)


def val_batches(length: int, batch_size: int, rank: int, world_size: int) -> list[list[Key]]:
    """Whole batches dealt out in turn: each image once, and no batch depends on `world_size`."""
    batches = torch.arange(length).split(batch_size)[rank::world_size]
    return [[(0, index) for index in batch.tolist()] for batch in batches]


@dataclass(eq=False)
class PrefetchLoader:
    """Batches of a data set as (n, 3, S, S) network inputs and (n,) labels on the device.

    On a GPU each is copied and normalised on a stream of its own while the one before is computed.
    """

    dataset: SeededDataset
    sampler: EpochBatchSampler | Sequence[list[Key]]
    workers: int | None
    device: torch.device

    def __post_init__(self):
        workers = loading_workers(self.workers)
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=worker_init,
            # Workers share the list of files with this process, which is their parent.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # Its own generator: the loader draws a seed for its workers, which nothing here uses.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration give the batches of `epoch` from `start_batch` on."""
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch

    def image_indices(self, batch: int) -> list[int]:
        """Which images are in a training batch of this epoch, over all processes."""
        return self.sampler.global_batches()[batch].tolist()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.device.type != "cuda":
            for pixels, shifts, labels in self._batches():
                yield normalize_batch(pixels, shifts), labels
            return
        copying = _copying_stream(self.device)
        computing = torch.cuda.current_stream(self.device)
        ready = None
        for batch in self._batches():
            with torch.cuda.stream(copying):
                pixels, shifts, labels = (part.to(self.device, non_blocking=True) for part in batch)
                coming = normalize_batch(pixels, shifts), labels
            if ready is not None:
                yield ready
            computing.wait_stream(copying)
            for part in coming:
                part.record_stream(computing)
            ready = coming
        if ready is not None:
            yield ready

    def _batches(self) -> Iterator[list[Tensor]]:
        """(n, S, S, 3) bytes, (n, 3) channel shifts and (n,) labels."""
        try:
            yield from self.loader
        except (ConnectionError, EOFError) as error:  # it died while it handed over a batch
            raise WorkerLost(error) from error


@functools.cache  # memory freed on a stream serves that stream alone
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class CachedLoader(PrefetchLoader):
    """Training batches of a small data set that lies decoded on the device, and is cropped there.

    An image's augmentation is a function of (seed, epoch, index) as well, but another one.
    """

    def __post_init__(self):
        self.pixels, self.labels = (part.to(self.device) for part in self.dataset.decoded())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, transform = len(self.dataset), self.dataset.transform
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                mixed_seed(self.dataset.seed, self.sampler.epoch, count)
            )
            draws = [part.to(self.device) for part in transform.draw(count, self.pixels.shape[2])]
        batches = [[index for _, index in keys] for keys in self.sampler]
        order = torch.tensor(list(chain.from_iterable(batches)), device=self.device)
        for chosen in order.split(list(map(len, batches))):
            parts = (part[chosen] for part in (self.pixels, *draws))
            yield transform.crop_batch(*parts), self.labels[chosen]


class KeptBatches(PrefetchLoader):
    """Validation batches of a small data set, which stay on the device after the first pass."""

    kept: Sequence[tuple[Tensor, Tensor]] = ()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.kept = self.kept or list(super().__iter__())
        return iter(self.kept)


def worker_init(worker: int) -> None:
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


def loading_workers(wanted: int | None) -> int:
    """`wanted`; None is as many as this process has cores, of which those of a machine share all.

    More workers than cores only wait for each other, and no result depends on their number.
    """
    cores = usable_cores()
    share = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    return min(share if wanted is None else wanted, cores)


def usable_cores() -> int:
    """Those a scheduler left to this process, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
