"""What happens to a batch: one epoch of training, one pass of evaluation."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from utils.data.loader import PrefetchLoader
from utils.losses import at_least_float32, batch_loss
from utils.metrics import Meter
from utils.precision import autocast
from utils.run.distributed import all_reduce_min, all_reduce_sum, gradient_sync, share_weight
from utils.run.errors import NonFiniteError
from utils.run.state import TrainState

Batches = Iterable[tuple[Tensor, Tensor]]


def train_one_epoch(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: PrefetchLoader,
    optimizer: Optimizer,
    config,
    state: TrainState,
) -> dict[str, float]:
    """Update `model` once per batch and return the epoch's results over all processes.

    Args:
        model: the student; several processes wrap it with `utils.run.distributed.distribute`.
        teacher: gives the soft targets; None trains on the labels.
        batches: this process's share of each batch, (n, 3, H, W) images and (n,) labels.
        config: its `precision`, `label_smoothing` and `accumulate`, the number of parts that a
            batch is computed in one after the other.
        state: its meter takes the epoch's sums, and its hooks are called after each update.

    Raises:
        NonFiniteError: before such a loss or gradient reaches the weights.
    """
    model.train()
    with FiniteGuard(model, optimizer, batches, state) as guard:
        for images, labels in batches:
            optimizer.zero_grad()
            # A loss, a mean, times len(y) is the sum over a part of the batch; times `weight`, and
            # added up over parts and processes, this becomes the mean over the whole batch.
            weight = share_weight(len(labels), images.device) / len(labels)
            parts = config.accumulate
            if parts > 1:  # as many on every process: SyncBN waits for all of them in each
                parts = all_reduce_min(min(parts, len(labels)))
            chunks = images.tensor_split(parts), labels.tensor_split(parts)
            losses = []
            for x, y in zip(*chunks, strict=True):
                is_last = len(losses) == len(chunks[0]) - 1
                with gradient_sync(model, is_last):
                    with autocast(images.device, config.precision):
                        logits = model(x)  # (n, classes)
                        loss = batch_loss(logits, x, y, teacher, config.label_smoothing)
                    (loss * weight * len(y)).backward()
                state.meter.update(loss, logits, y)
                losses.append(loss)
            guard.check(torch.stack(losses).sum())
            optimizer.step()
            state.end_step()
    return reduced(state.meter).results()


class FiniteGuard(AbstractContextManager):
    """Ends a run whose loss or gradient is not finite, before that update reaches the weights.

    A context around the iterations of an epoch.  On a GPU no update waits for the values: the fused
    optimizer skips it by itself (`found_inf`), and the error is raised one iteration later, or
    before a checkpoint is written.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, batches: Batches, state: TrainState):
        self.model, self.optimizer, self.batches, self.state = model, optimizer, batches, state
        self.pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        state.before_save = self.settle

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self.settle()

    @torch.no_grad()
    def check(self, loss: Tensor) -> None:
        """Look at the loss and the norm of the gradient of the update to be made.

        Raises:
            NonFiniteError: one of them is not finite, in this or an earlier iteration.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        values = torch.stack([loss.float(), get_total_norm(gradients)])
        self.settle()  # of the iteration before, while the device computes this one
        if runs_ahead(values.device, self.optimizer):
            self.optimizer.found_inf = values.isfinite().all().logical_not().float()
            copy = values.to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event() if values.is_cuda else None
            self.pending = self.state.iteration, copy, event
        else:
            self.pending = self.state.iteration, values, None
            self.settle()

    def settle(self) -> None:
        """Wait for the values of the iteration checked last, and raise NonFiniteError for them."""
        if self.pending is None:
            return
        (iteration, values, event), self.pending = self.pending, None
        if event:
            event.synchronize()
        for name, value in zip(("loss", "gradient's norm"), values.tolist(), strict=True):
            if not math.isfinite(value):
                images = ", ".join(map(str, self.batches.image_indices(iteration)))
                raise NonFiniteError(
                    f"the {name} is {value} at epoch {self.state.epoch}, iteration {iteration},"
                    f" images {images}; the weights were not changed by it:"
                    " look at these images, or start again with another learning_rate"
                )


def runs_ahead(device: torch.device, optimizer: Optimizer) -> bool:
    """Whether the device computes behind the host, and the optimizer takes a flag `found_inf`."""
    return device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    precision: str = "float32",
    progress: Callable[[Batches], Batches] = iter,
) -> Meter:
    """Cross-entropy and accuracy on the labels, over the batches of all processes together."""
    model.eval()
    meter = Meter()
    for images, labels in progress(batches):
        with autocast(images.device, precision):
            logits = model(images)  # (n, classes)
        losses = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
        meter.update(losses, logits, labels)
    return reduced(meter)


def reduced(meter: Meter) -> Meter:
    """Sum over all processes, of which one may have seen no batch."""
    meter.sums = all_reduce_sum(meter.sums.cpu())
    return meter


@torch.no_grad()
def count_outputs(model: nn.Module, image_size: int, device: torch.device) -> int:
    """The number of logits of a network in eval mode, found by a forward pass."""
    return model(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
