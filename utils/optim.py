"""Adam as released: which parameters decay, and the learning rate of each epoch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from utils.command_line import printable
from utils.errors import InputError

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}


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


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    decay_group: str = "released",
    name: str = "Adam",
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Adam with coupled L2 (added to the gradient) on one of its two parameter groups.

    Group 0 is left alone, group 1 decays: the order of the released optimizer states.

    Args:
        name: another optimizer of `torch.optim`, for experiments.
        options: further arguments of its constructor, such as `momentum`.

    Raises:
        InputError: no such optimizer, one without weight decay, or options it does not take.
    """
    decays = DECAY_GROUPS[decay_group]
    groups: list[list[nn.Parameter]] = [[], []]
    for parameter_name, parameter in model.named_parameters():
        groups[decays(parameter_name, parameter)].append(parameter)
    constructor = getattr(torch.optim, name, None)
    if not (isinstance(constructor, type) and issubclass(constructor, Optimizer)):
        raise InputError(
            f"unknown optimizer {name!r}: name one of torch.optim, such as Adam or SGD"
        )
    arguments = (ADAM if name == "Adam" else {}) | dict(options or {})
    try:
        optimizer = constructor(
            [
                {"params": groups[False], "weight_decay": 0.0},
                {"params": groups[True], "weight_decay": weight_decay},
            ],
            lr=learning_rate,
            **arguments,
        )
        like = next(model.parameters())
        if "weight_decay" in optimizer.defaults and not like.is_meta:
            _try_steps(constructor, like, arguments)
    except Exception as error:  # options are checked by computing with them, whatever they are
        said = printable(str(error).partition("\n")[0])
        raise InputError(f"optimizer {name} cannot be built so: {said}") from error
    if "weight_decay" not in optimizer.defaults:
        raise InputError(f"optimizer {name} knows no weight decay: choose another")
    return optimizer


def _try_steps(
    constructor: type[Optimizer], like: nn.Parameter, arguments: Mapping[str, Any]
) -> None:
    """Update a parameter that nobody needs: some options fail in a step, or in the second."""
    parameter = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = constructor([parameter], lr=0.1, **arguments)
    for _ in range(2):
        optimizer.step()


def describe_groups(optimizer: Optimizer) -> str:
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
