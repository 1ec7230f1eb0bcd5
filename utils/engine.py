"""What happens to a batch: one epoch of training, one pass of validation."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from utils.distributed import reduces_gradients, share_weight, sum_over_processes
from utils.losses import batch_loss, in_full_precision
from utils.precision import autocast


class NotFinite(ArithmeticError):
    """The loss of a batch or its gradient's norm is not finite; the weights have not seen it."""


class Meter:
    """Loss, top-1 and top-5 over the images seen, summed on the device without waiting for it.

    Args:
        state: of an earlier `state_dict`, whose sums and time go on.
    """

    def __init__(self, device: torch.device, state: Mapping[str, Any] | None = None):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.started = time.perf_counter()
        if state:
            self.sums += state["sums"].to(device)
            self.started -= state["seconds"]

    def state_dict(self) -> dict[str, Any]:
        """sums (5,) of this process, and seconds since the start."""
        return {"sums": self.sums.cpu(), "seconds": time.perf_counter() - self.started}

    @torch.no_grad()
    def update(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its (n,) losses or their mean, (n, classes) logits and (n,) labels."""
        losses = losses.double().expand(len(labels))
        best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
        hits = best == labels[:, None]
        self.sums[0] += losses.sum()
        self.sums[1] += losses.square().sum()
        self.sums[2] += hits[:, 0].sum()
        self.sums[3] += hits.sum()
        self.sums[4] += len(labels)

    def reduce(self) -> "Meter":
        """Sum over all processes."""
        sum_over_processes(self.sums)
        return self

    def results(self) -> dict[str, float]:
        """loss (mean), top1 and top5 (percent), images, images_per_second."""
        loss, _, top1, top5, images = self.sums.tolist()
        return {
            "loss": loss / images,
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "images": int(images),
            "images_per_second": images / (time.perf_counter() - self.started),
        }

    def loss_deviation(self) -> float:
        """Standard deviation of the losses of single images."""
        loss, squares, *_, images = self.sums.tolist()
        return math.sqrt(max(squares / images - (loss / images) ** 2, 0.0))


Progress = Callable[[Iterable, Meter], Iterable]


def without_progress(batches: Iterable, meter: Meter) -> Iterable:
    return batches


def train_one_epoch(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    device: torch.device,
    label_smoothing: float = 0.0,
    precision: str = "float32",
    accumulate: int = 1,
    progress: Progress = without_progress,
    after_step: Callable[[], None] | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Update `model` once per batch and return the epoch's results over all processes.

    Args:
        model: the student; several processes wrap it with `utils.distributed.distribute`.
        teacher: gives the soft targets; None trains on the labels.
        batches: this process's share of each batch, (n, 3, H, W) images and (n,) labels.
        accumulate: parts that a batch is computed in one after the other.
        after_step: called after each update of the weights, once the meter has it.
        meter: of the batches of this epoch that were trained on before.

    Raises:
        NotFinite: before such a loss or gradient reaches the weights.
    """
    model.train()
    meter = meter or Meter(device)
    for images, labels in progress(batches, meter):
        optimizer.zero_grad()
        weight = share_weight(len(labels), device) / len(labels)
        parts = list(zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True))
        losses = []
        for number, (part, its_labels) in enumerate(parts, start=1):
            with reduces_gradients(model, number == len(parts)):
                with autocast(device, precision):
                    logits = model(part)
                    loss = batch_loss(logits, part, its_labels, teacher, label_smoothing)
                (loss * weight * len(its_labels)).backward()
            meter.update(loss, logits, its_labels)
            losses.append(loss)
        refuse_not_finite(torch.stack(losses).sum(), model)
        optimizer.step()
        if after_step:
            after_step()
    return meter.reduce().results()


@torch.no_grad()
def refuse_not_finite(loss: Tensor, model: nn.Module) -> None:
    """Raise NotFinite unless the loss and the norm of the gradient of `model` are finite."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    values = torch.stack([loss.float(), get_total_norm(gradients)]).tolist()
    for name, value in zip(("loss", "gradient's norm"), values, strict=True):
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value}")


def validate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    precision: str = "float32",
    progress: Progress = without_progress,
) -> dict[str, float]:
    """Cross-entropy and accuracy on the labels, over the batches of all processes together."""
    return measure(model, batches, device, precision, progress).results()


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    precision: str = "float32",
    progress: Progress = without_progress,
) -> Meter:
    """The meter behind `validate`, which also knows how the losses scatter."""
    model.eval()
    meter = Meter(device)
    for images, labels in progress(batches, meter):
        with autocast(device, precision):
            logits = model(images)
        losses = F.cross_entropy(in_full_precision(logits), labels, reduction="none")
        meter.update(losses, logits, labels)
    return meter.reduce()


@torch.no_grad()
def count_outputs(model: nn.Module, image_size: int, device: torch.device) -> int:
    """The number of classes a network in eval mode tells apart, asked of the network itself."""
    return model(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
