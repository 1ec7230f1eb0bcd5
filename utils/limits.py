"""What the machine or a network cannot compute, in one sentence, wherever a run meets it."""

import contextlib
from collections.abc import Iterator

import torch

from utils.config import Config
from utils.distributed import Process
from utils.errors import InputError

# What allocators other than Python's and CUDA's say in plain RuntimeErrors and OSErrors.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "_alloc_failed")
_LONE_VALUE = "more than 1 value per channel"


@contextlib.contextmanager
def limits_told(config: Config, process: Process) -> Iterator[None]:
    """Turn what stops a run for its sizes, from building the network on, into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise InputError(_too_large(config, process)) from error
        if any(_LONE_VALUE in str(one) for one in _chain(error)):
            raise InputError(_too_small(config)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a compiler or a loading worker wrapped the error in its own."""
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError)
        or (
            isinstance(one, RuntimeError | OSError)
            and any(words in str(one).lower() for words in _NO_MEMORY)
        )
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _too_large(config: Config, process: Process) -> str:
    share = config.batch_size // process.world_size
    return (
        f"out of memory with batch_size {config.batch_size}, {share} images in each of"
        f" {process.world_size} processes, image_size {config.image_size}, val_resize"
        f" {config.val_resize}, width {config.width}: choose a smaller one, or use more processes"
    )


def _too_small(config: Config) -> str:
    return (
        f"a batch of one image of image_size {config.image_size} ends as one value per channel,"
        f" which BN cannot normalise: choose another batch_size (here {config.batch_size}),"
        f" a smaller accumulate (here {config.accumulate}), or larger images"
    )
