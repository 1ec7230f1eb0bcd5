"""What happens to a batch: one epoch of training, one pass of evaluation."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from utils.data.loader import PrefetchLoader
from utils.losses import at_least_float32, batch_loss
from utils.metrics import Meter
from utils.precision import autocast
from utils.run.distributed import all_reduce_sum, gradient_sync, share_weight
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
    for images, labels in batches:
        optimizer.zero_grad()
        # Makes the mean over this share of the batch its part of the mean over the whole batch.
        weight = share_weight(len(labels), images.device) / len(labels)
        chunks = images.chunk(config.accumulate), labels.chunk(config.accumulate)
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
        check_finite(torch.stack(losses).sum(), model, batches, state)
        optimizer.step()
        state.end_step()
    return reduced(state.meter).results()


@torch.no_grad()
def check_finite(loss: Tensor, model: nn.Module, batches: Batches, state: TrainState) -> None:
    """Raise NonFiniteError unless the loss and the norm of the gradient of `model` are finite."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    values = torch.stack([loss.float(), get_total_norm(gradients)]).tolist()
    for name, value in zip(("loss", "gradient's norm"), values, strict=True):
        if not math.isfinite(value):
            images = ", ".join(map(str, batches.image_indices(state.iteration)))
            raise NonFiniteError(
                f"the {name} is {value} at epoch {state.epoch}, iteration {state.iteration},"
                f" images {images}; the weights were not changed by it:"
                " look at these images, or start again with another learning_rate"
            )


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
    """The number of classes a network in eval mode tells apart, asked of the network itself."""
    return model(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
