"""The paper's measures of training, as pure functions of tensors or of a model.

Signs are booleans, True for +1.  "Latent weights" are those of every layer whose weights are, or
will be, binary (`LatentConv2d`): in step 1 they still act as real weights, and have signs as well.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.binarize import LatentConv2d, Sign, shifted
from utils.errors import InputError

HISTOGRAM_LIMIT = 1.5  # latent weights beyond it count as at it


def latent_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> latent weights (O, I, kH, kW), in the order of definition.

    Raises:
        InputError: the model has none.
    """
    found = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, LatentConv2d)}
    if not found:
        raise InputError(f"this {type(model).__name__} has no layers with latent weights")
    return found


def signs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer name -> whether each weight's Sign is +1, same shapes."""
    return {name: weight >= 0 for name, weight in weights.items()}


def changed_share(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of all weights whose signs differ: sum |Sign(w') - Sign(w)| / 2 / N_total."""
    changed = sum(int(torch.count_nonzero(before[name] != after[name])) for name in before)
    return changed / sum(sign.numel() for sign in before.values())


def ff_ratio(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Flip-flop ratio of one iteration: the share of signs that the update flipped."""
    return changed_share(before, after)


def c2i_ratio(
    initial: Mapping[str, Tensor], final: Mapping[str, Tensor], literal: bool = False
) -> float:
    """Correlation to initialization: 1 - the share of signs that differ from their first ones.

    Args:
        literal: with the further factor 1/2 that the slides print in Eq. 7; the published values
            go below 0.5, which only the ratio without it can.
    """
    return 1 - changed_share(initial, final) * (0.5 if literal else 1.0)


def channel_absolute_mean(weight: Tensor) -> Tensor:
    """CAM: mean |w| over each output kernel, (O, I, kH, kW) -> (O,).  Of an update: update CAM."""
    return weight.abs().flatten(1).mean(1)


def deviation_of_absolute_means(weight: Tensor) -> float:
    """SDAM: standard deviation of CAM over the output channels (of the whole set, not a sample)."""
    return channel_absolute_mean(weight).std(correction=0).item()


def share_above(weight: Tensor, threshold: float) -> float:
    """Share of weights with |w| > threshold."""
    return (weight.abs() > threshold).double().mean().item()


def histogram(x: Tensor, bins: int = 60, limit: float = HISTOGRAM_LIMIT) -> Tensor:
    """Counts of values in `bins` equal bins over [-limit, limit]; those outside go to the ends."""
    return torch.histc(x.float().clamp(-limit, limit), bins, -limit, limit).long()


def saturation(x: Tensor) -> float:
    """Share of |x| > 1 at the input of Sign, where the clip estimator passes no gradient."""
    return share_above(x, 1.0)


def saturation_by_layer(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Name of each Sign layer -> saturation of its input on (N, 3, H, W) images, in eval mode."""
    return at_signs(model, images, saturation)


@torch.no_grad()
def at_signs(model: nn.Module, images: Tensor, measure: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Name of each Sign layer, in order of execution -> `measure` of its input, in eval mode.

    Raises:
        InputError: the model has no Sign.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, Sign)}
    if not names:
        raise InputError(f"this {type(model).__name__} has no binary activations")
    found: dict[str, Any] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, inputs: found.update({names[m]: measure(shifted(*inputs))})
        )
        for module in names
    ]
    was_training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found
