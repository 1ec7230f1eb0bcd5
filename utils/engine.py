"""What happens to a batch: one epoch of training, one pass of validation."""

import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.distributed import share_weight, sum_over_processes
from utils.losses import batch_loss


class Meter:
    """Loss, top-1 and top-5 over the images seen, summed on the device without waiting for it."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.started = time.perf_counter()

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, (n, classes) logits and (n,) labels."""
        best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
        hits = best == labels[:, None]
        n = len(labels)
        self.sums += torch.stack(
            [loss.double() * n, hits[:, 0].sum(), hits.sum(), torch.tensor(n, device=loss.device)]
        )

    def reduce(self) -> "Meter":
        """Sum over all processes."""
        sum_over_processes(self.sums)
        return self

    def results(self) -> dict[str, float]:
        """loss (mean), top1 and top5 (percent), images, images_per_second."""
        loss, top1, top5, images = self.sums.tolist()
        return {
            "loss": loss / images,
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "images": int(images),
            "images_per_second": images / (time.perf_counter() - self.started),
        }


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
    progress: Progress = without_progress,
) -> dict[str, float]:
    """Update `model` once per batch and return the epoch's results over all processes.

    Args:
        model: the student; several processes wrap it with `utils.distributed.distribute`.
        teacher: gives the soft targets; None trains on the labels.
        batches: this process's share of each batch, (n, 3, H, W) images and (n,) labels.
    """
    model.train()
    meter = Meter(device)
    for images, labels in progress(batches, meter):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = model(images)
        loss = batch_loss(logits, images, labels, teacher, label_smoothing)
        optimizer.zero_grad()
        (loss * share_weight(len(labels), device)).backward()
        optimizer.step()
        meter.update(loss, logits, labels)
    return meter.reduce().results()


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    progress: Progress = without_progress,
) -> dict[str, float]:
    """Cross-entropy and accuracy on the labels, over the batches of all processes together."""
    model.eval()
    meter = Meter(device)
    for images, labels in progress(batches, meter):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = model(images)
        meter.update(F.cross_entropy(logits, labels), logits, labels)
    return meter.reduce().results()
