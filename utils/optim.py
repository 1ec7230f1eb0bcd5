"""Adam as released: which parameters decay, and the learning rate of each epoch."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Adam

BETAS = (0.9, 0.999)
EPS = 1e-8


def decays_as_released(name: str, parameter: nn.Parameter) -> bool:
    """4-D, or 'conv' in the name: all convolutions, and also the RSign and RPReLU shifts."""
    return parameter.ndim == 4 or "conv" in name


def decays_if_convolution(name: str, parameter: nn.Parameter) -> bool:
    """Kernels only: the shifts are 4-D, but biases."""
    return parameter.ndim == 4 and not name.endswith("bias")


DECAY_GROUPS: dict[str, Callable[[str, nn.Parameter], bool]] = {
    "released": decays_as_released,
    "convolutions": decays_if_convolution,
}

# Epochs by which the schedule runs ahead.
SCHEDULES = {"released": 1, "textbook": 0}


def build_adam(
    model: nn.Module, learning_rate: float, weight_decay: float, decay_group: str = "released"
) -> Adam:
    """Adam with coupled L2 (added to the gradient) on one of its two parameter groups.

    Group 0 is left alone, group 1 decays: the order of the released optimizer states.
    """
    decays = DECAY_GROUPS[decay_group]
    groups = [[], []]
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    return Adam(
        [
            {"params": groups[False], "weight_decay": 0.0},
            {"params": groups[True], "weight_decay": weight_decay},
        ],
        lr=learning_rate,
        betas=BETAS,
        eps=EPS,
    )


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line for the log: tensors, values and decay of each group."""
    return "; ".join(
        f"{len(group['params'])} tensors ({sum(p.numel() for p in group['params']):,} values)"
        f" with weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    )


def learning_rate(epoch: int, base: float, epochs: int, schedule: str = "released") -> float:
    """Rate of a whole epoch, counted from 0, decaying linearly over `epochs`.

    released: base * (1 - (epoch + 1) / epochs): the scheduler is stepped before the first epoch,
        so the base rate is never used and the last epoch runs at exactly 0 (only BN moves).
    textbook: base * (1 - epoch / epochs).
    """
    return base * (1 - (epoch + SCHEDULES[schedule]) / epochs)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
