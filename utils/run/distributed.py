"""One process or several: who this process is, and the few collective operations training needs."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from utils.run.errors import PeerLost, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """This process among the `world_size` that train together; it computes on `device`."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


@contextmanager
def init_distributed() -> Iterator[DistEnv]:
    """Join the processes that torchrun started (or stand alone), and leave them at the end.

    Raises:
        UserError: more processes than GPUs.
        PeerLost: one of the others ended while this one waited for it.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own:"
                f" start at most {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        # Tensors on the GPU travel by nccl; what the CPU has to decide does not wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield DistEnv(rank, local_rank, world_size, device)
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source files.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost(
                f"process {rank} lost the others: start all again with the same command,"
                " which goes on from the last checkpoint"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def local_rank0_first(env: DistEnv) -> Iterator[None]:
    """Let local rank 0 run the block (fill a cache, download) before the others enter it."""
    if env.local_rank != 0:
        barrier()
    yield
    if env.local_rank == 0:
        barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Replace `value` by its sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_reduce_any(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any env."""
    if not dist.is_initialized():
        return list(flags)
    return [count > 0 for count in all_reduce_sum(torch.tensor(flags, dtype=torch.int)).tolist()]


def gather(env: DistEnv, value: Any) -> list[Any]:
    """The values of all processes in rank order, on the main one; elsewhere an empty list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * env.world_size if env.is_rank0 else None
    dist.gather_object(value, values)
    return values or []


def broadcast_from_rank0(env: DistEnv, compute: Callable[[], T]) -> T:
    """What `compute` returns on the main process, the only one to call it, on every process.

    Raises:
        UserError: `compute` raised it; on every process.
    """
    answer: list[Any] = [None, None]
    if env.is_rank0:
        try:
            answer[0] = compute()
        except UserError as error:
            answer[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


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
    batch = all_reduce_sum(torch.tensor(share, dtype=torch.float64, device=device))
    return share * dist.get_world_size() / batch


def distribute(model: nn.Module, env: DistEnv, sync_bn: bool) -> nn.Module:
    """Wrap `model` (already on its device) so that backward averages gradients over processes.

    BN statistics are those of each process's share, and rank 0's running averages are kept, as in
    the released code; with `sync_bn` they are those of the whole batch.
    """
    if env.world_size == 1:
        return model
    if sync_bn:
        model = synchronize_batch_norm(model)
    gpu = [env.device] if env.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpu)


def gradient_sync(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Whether a backward pass averages gradients over processes; the last part of a batch does."""
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm2d of `model` use the statistics of the batch over all processes."""
    if next(model.parameters()).device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm2d
    return model


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for CPU tensors, which torch's own refuses: (N, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        self.num_batches_tracked += 1
        count = _AllReduce.apply(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _AllReduce.apply(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = _AllReduce.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


class _AllReduce(torch.autograd.Function):
    """y = sum of x over processes;  dL/dx = sum of dL/dy over processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.clone())
