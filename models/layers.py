"""Small layers that the binary networks share."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from utils.binarize import BinaryConv2d, LatentConv2d, Sign, shifted
from utils.errors import InputError


class ChannelShift(nn.Module):
    """One learned shift per channel, starting at 0, which the layer it is passed to adds.

    `bias` is stored as (1, C, 1, 1), the released layout; being 4-D it falls into the released
    code's weight-decay group.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))


class KeepReal(nn.Module):
    """Stands where Sign would: x, or x + b with a shift per channel."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return shifted(x, shift)


def scaled_width(channels: int, width: float) -> int:
    """`channels` of the stem times `width`, rounded.

    The other counts are multiples of the stem's, so that rounding never breaks a doubling.

    Raises:
        InputError: no channel is left.
    """
    scaled = round(channels * width)
    if scaled < 1:
        raise InputError(f"width {width} leaves no channel: give at least {1 / channels}")
    return scaled


def sign_factory(binary_activations: bool, activation_ste: str) -> Callable[[], nn.Module]:
    """Makes the layer before each convolution that may be binary: Sign, or nothing."""
    return partial(Sign, activation_ste) if binary_activations else KeepReal


def conv_factory(binary_weights: bool, latent_init: str) -> Callable[..., nn.Conv2d]:
    """Makes the convolutions that may be binary, without bias."""
    if binary_weights:
        return partial(BinaryConv2d, bias=False, latent_init=latent_init)
    return partial(LatentConv2d, bias=False)
