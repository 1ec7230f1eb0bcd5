"""Adam as released: which parameters decay, and the learning rate of each epoch."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from utils.binarize import latent_convolutions
from utils.run.errors import UserError

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}


def build_optimizer(model: nn.Module, config) -> Optimizer:
    """Adam with coupled L2 decay (added to the gradient, unlike AdamW's) of one parameter group.

    Group 0 has no weight decay, group 1 has: the order of the released optimizer states.  With a
    `latent_rate` other than 1 latent weights are a third group, with weight decay.

    Args:
        config: its `learning_rate`, `latent_rate`, `weight_decay`, `decay_group`, `optimizer` (the
            name of another one of `torch.optim`) and `optimizer_options` (of its constructor).

    Raises:
        UserError: no such optimizer, one without weight decay, or options it does not take.
    """
    name = config.optimizer
    constructor = getattr(torch.optim, name, None)
    if not (isinstance(constructor, type) and issubclass(constructor, Optimizer)):
        raise UserError(f"unknown optimizer {name!r}: name one of torch.optim, such as Adam or SGD")
    decaying = DECAY_GROUPS[config.decay_group](model)
    own_rate = latent_parameters(model) if config.latent_rate != 1 else set()
    others = [p for p in model.parameters() if p not in own_rate]
    decay = {"weight_decay": config.weight_decay}
    groups = [
        {"params": [p for p in others if p not in decaying], "weight_decay": 0.0},
        {"params": [p for p in others if p in decaying], **decay},
    ]
    if own_rate:
        latent = [p for p in model.parameters() if p in own_rate]
        groups.append({"params": latent, "rate": config.latent_rate, **decay})
    options = (ADAM if name == "Adam" else {}) | (config.optimizer_options or {})
    if own := {"lr", "weight_decay"} & options.keys():
        raise UserError(
            f"optimizer_options has {min(own)}: set learning_rate and weight_decay instead"
        )
    try:
        optimizer = constructor(groups, lr=config.learning_rate, **options)
    except Exception as error:  # each optimizer checks its options in its own way
        reason = str(error).partition("\n")[0]
        raise UserError(f"optimizer {name} with {options} cannot be built: {reason}") from error
    if "weight_decay" not in optimizer.defaults:
        raise UserError(f"optimizer {name} knows no weight decay: choose another")
    return optimizer


def released_group(model: nn.Module) -> set[nn.Parameter]:
    """4-D, or 'conv' in the name: all convolutions, and also the RSign and RPReLU shifts."""
    return {p for name, p in model.named_parameters() if p.ndim == 4 or "conv" in name}


def convolutions(model: nn.Module) -> set[nn.Parameter]:
    """Kernels only: the shifts, which are 4-D too, have names that end in "bias"."""
    return {p for name, p in model.named_parameters() if p.ndim == 4 and not name.endswith("bias")}


def latent_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The kernels of the convolutions that are binary in step 2."""
    return {layer.weight for layer in latent_convolutions(model).values()}


DECAY_GROUPS: dict[str, Callable[[nn.Module], set[nn.Parameter]]] = {
    "released": released_group,
    "convolutions": convolutions,
    "latent": latent_parameters,
}


def released_schedule(epoch: int, epochs: int) -> float:
    """1 - (epoch + 1) / epochs: the scheduler is stepped before the first epoch.

    So the base rate is never used, and the last epoch, or the only one, runs at exactly 0.
    """
    return 1 - (epoch + 1) / epochs


def textbook_schedule(epoch: int, epochs: int) -> float:
    """1 - epoch / epochs."""
    return 1 - epoch / epochs


def cosine_schedule(epoch: int, epochs: int) -> float:
    """(1 + cos(pi epoch / epochs)) / 2."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


# Rate of a whole epoch, counted from 0, as a share of the base rate.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "released": released_schedule,
    "textbook": textbook_schedule,
    "cosine": cosine_schedule,
}


def set_learning_rate(optimizer: Optimizer, epoch: int, config) -> float:
    """Give all parameter groups the rate of `epoch`, times their own, and return it."""
    rate = config.learning_rate * SCHEDULES[config.schedule](epoch, config.epochs)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)
    return rate


def describe_groups(optimizer: Optimizer) -> str:
    """One line for the log: tensors, values and decay of each group."""
    return "; ".join(
        f"{len(group['params'])} tensors ({sum(p.numel() for p in group['params']):,} values)"
        f" with weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    )
