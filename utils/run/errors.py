"""How a run ends early; `command_line.command` makes one sentence and an exit code of each kind."""

import contextlib
from collections.abc import Iterator

import torch


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence saying what to do."""


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not finite; the weights have not been updated with it."""


class OutOfMemory(RuntimeError):
    """The machine has too little memory for the run; the message names the sizes that decide."""


class Preempted(Exception):
    """The run was asked to stop and has saved a checkpoint; the same command goes on."""


class PeerLost(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class WorkerLost(RuntimeError):
    """A loading worker has ended; `error` is what that caused."""

    def __init__(self, error: Exception):
        super().__init__(
            f"a loading worker ended ({error!r}): pass a smaller --workers if memory ran out;"
            " the same command goes on from the last checkpoint"
        )


# What allocators other than Python's and CUDA's say in plain RuntimeErrors and OSErrors.
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "_alloc_failed")
_LONE_VALUE = "more than 1 value per channel"


@contextlib.contextmanager
def explain_limits(config, world_size: int) -> Iterator[None]:
    """Turn what stops a run for its sizes, from building the network on, into one sentence.

    Raises:
        OutOfMemory: instead of the many types that allocators, compilers and workers raise.
        UserError: the batch is too small for BN.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"out of memory with batch_size {config.batch_size}, of which each of"
                f" {world_size} processes has {config.batch_size // world_size} images,"
                f" image_size {config.image_size}, val_resize {config.val_resize},"
                f" width {config.width}: choose a smaller one, or use more processes"
            ) from error
        if any(_LONE_VALUE in str(cause) for cause in _causes(error)):
            raise UserError(
                f"a batch of one image of image_size {config.image_size} leaves BN one value per"
                f" channel: choose another batch_size (here {config.batch_size}), a smaller"
                f" accumulate (here {config.accumulate}), or larger images"
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a compiler or a loading worker wrapped the error in its own."""
    return any(
        isinstance(cause, torch.OutOfMemoryError | MemoryError)
        or (
            isinstance(cause, RuntimeError | OSError)
            and any(words in str(cause).lower() for words in _NO_MEMORY)
        )
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
