"""Small layers that the binary networks share."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.binarize import BinaryConv2d, LatentConv2d, Sign, add_shift
from utils.run.errors import UserError


class LearnableBias(nn.Module):
    """One learned shift per channel, starting at 0, which the layer it is passed to adds.

    `bias` is stored as (1, C, 1, 1), the released layout; being 4-D it falls into the released
    code's weight-decay group.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))


class _AvgPool2x2Function(torch.autograd.Function):
    """Means of 2x2 windows of an even size; each pixel's gradient is a quarter of its window's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return F.interpolate(grad / 4, scale_factor=2)


class AvgPool2x2(nn.AvgPool2d):
    """Means of 2x2 windows: (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self):
        super().__init__(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            return super().forward(x)
        # Its own gradient, of which torch.compile makes far faster code than of torch's.
        return _AvgPool2x2Function.apply(x)


class RealActivation(nn.Module):
    """Stands where Sign would: x, or x + b with a shift per channel."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return add_shift(x, shift)


def scaled_width(channels: int, width: float) -> int:
    """`channels` of the stem times `width`, rounded.

    The other counts are multiples of the stem's, so that rounding never breaks a doubling.

    Raises:
        UserError: no channel is left.
    """
    scaled = round(channels * width)
    if scaled < 1:
        raise UserError(f"width {width} leaves no channel: give at least {1 / channels}")
    return scaled


def sign_factory(binary_activations: bool, activation_ste: str) -> Callable[[], nn.Module]:
    """Makes the layer before each convolution that may be binary: Sign, or nothing."""
    return partial(Sign, activation_ste) if binary_activations else RealActivation


def conv_factory(binary_weights: bool, latent_init: str) -> Callable[..., nn.Conv2d]:
    """Makes the convolutions that may be binary, without bias."""
    if binary_weights:
        return partial(BinaryConv2d, bias=False, latent_init=latent_init)
    return partial(LatentConv2d, bias=False)


def binary_convolutions(model: nn.Module) -> dict[str, BinaryConv2d]:
    """Name -> module, in the order they are defined."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryConv2d)}
