"""The loss of a batch: soft targets from a teacher, or labels where there is none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def soft_target_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy to the teacher's softmax, temperature 1, no labels; mean over the batch.

    L = -1/N sum_n sum_c softmax(t_n)_c log softmax(s_n)_c  for logits s and t, both (N, classes).
    Its gradient is that of KL(teacher || student); its minimum is the teacher's entropy, not 0.
    """
    return -(teacher_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def batch_loss(
    logits: Tensor, images: Tensor, labels: Tensor, teacher: nn.Module | None, smoothing: float
) -> Tensor:
    """Mean loss of (N, classes) logits: soft targets of the teacher, else the (N,) labels."""
    logits = at_least_float32(logits)
    if teacher is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    with torch.no_grad():
        teacher_logits = at_least_float32(teacher(images))
    return soft_target_loss(logits, teacher_logits)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits of autocast in float32, others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
