"""One process or several: who this process is, and the few collective operations training needs."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.run.device import choose_device
from utils.run.errors import PeerLost, Preempted, UserError, WorkerLost

T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """This process among the `world_size` that train together; it computes on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


@contextmanager
def init_distributed(device: str = "auto") -> Iterator[DistEnv]:
    """Join the processes that torchrun started (or stand alone), and leave them at the end.

    Raises:
        UserError: more processes than GPUs, or no usable GPU where one was expected.
        PeerLost: one of the others ended while this one waited for it.
        WorkerLost: a loading worker ended.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if world_size > 1:
            # Tensors on the GPU travel by nccl; what the CPU has to decide does not wait for it.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        yield DistEnv(rank, world_size, device)
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source files.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost(
                f"process {rank} lost the others: start all again with the same command,"
                " which goes on from the last checkpoint"
            ) from error
        if "DataLoader worker (pid" in str(error):
            raise WorkerLost(error) from error
        raise
    finally:
        if dist.is_initialized():
            if device.type == "cuda" and not isinstance(sys.exception(), Preempted | None):
                # Destroyed, NCCL would wait for the others, who wait for this process.
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
            # DDP's cycles keep the group, whose threads abort an interpreter that ends before them.
            gc.collect()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Replace `value` by its sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_reduce_any(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any process."""
    if not dist.is_initialized():
        return list(flags)
    return [count > 0 for count in all_reduce_sum(torch.tensor(flags, dtype=torch.int)).tolist()]


def all_reduce_min(count: int) -> int:
    """The smallest `count` of any process."""
    if not dist.is_initialized():
        return count
    smallest = torch.tensor(count)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return smallest.item()


def gather(env: DistEnv, value: Any) -> list[Any]:
    """The values of all processes in rank order, on rank 0; elsewhere an empty list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * env.world_size if env.is_rank0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast_from_rank0(env: DistEnv, compute: Callable[[], T]) -> T:
    """What `compute` returns on rank 0, the only process to call it, on every process.

    Raises:
        UserError: `compute` raised it; on every process.
    """
    result: list[Any] = [None, None]
    if env.is_rank0:
        try:
            result[0] = compute()
        except UserError as error:
            result[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's BN statistics (as DataParallel keeps its first replica's)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def share_weight(share: int, device: torch.device) -> Tensor | float:
    """Factor that turns the mean over this process's share into its part of the batch mean.

    DistributedDataParallel averages gradients over processes as if their shares were equal; the
    last batch of an epoch need not divide evenly, so each mean is scaled by share * W / batch.
    """
    if not dist.is_initialized():
        return 1.0
    # Filled on the device: a copy would wait for it.
    batch = all_reduce_sum(torch.full((), share, dtype=torch.float64, device=device))
    return share * dist.get_world_size() / batch


def distribute(model: nn.Module, env: DistEnv, sync_bn: bool) -> nn.Module:
    """Wrap `model` (already on its device) so that backward averages gradients over processes.

    BN statistics are those of each process's share, and rank 0's running averages are kept, as in
    the released code; with `sync_bn` they are those of the whole batch.

    Raises:
        UserError: `sync_bn` on CPUs, where torch has none.
    """
    if env.world_size == 1:
        return model
    if env.device.type != "cuda":
        if sync_bn:
            raise UserError("sync_bn needs GPUs: set it to false, or train in one process")
        return DistributedDataParallel(model)
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[env.device])


def gradient_sync(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Whether a backward pass averages gradients over processes; the last part of a batch does."""
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
