"""The options of the binary networks, and the small layers that they share."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class NetworkOptions:
    """The options of every network, and the layers that depend on them.

    The two flags give four networks of one parameter layout: both off is the real-valued network,
    `binary_activations` alone is step 1, `binary_weights` alone binarizes the weights first, both
    on is step 2.  Stem, shortcuts, BN, shifts, PReLU and `fc` are always real-valued.

    Building a network raises UserError for an unknown `activation_ste` or `latent_init`, and for a
    `width` that leaves no channel.
    """

    binary_activations: bool = True  # Sign before each convolution that may be binary
    binary_weights: bool = True  # these convolve with mean|w| * Sign(w) of their latent weights
    activation_ste: str = "polynomial"  # gradient of Sign, as in the released code, or "clip"
    width: float = 1.0  # multiplies every channel count
    small_images: bool = False  # for 32 pixels: stride 8, not 32; the head still sees 4x4 positions
    latent_init: str = "positive"  # start of latent weights, as released, or "symmetric"

    def sign(self) -> nn.Module:
        """The layer before a convolution that may be binary."""
        return Sign(self.activation_ste) if self.binary_activations else RealActivation()

    def conv(self, *args, **kwargs) -> LatentConv2d:
        """A convolution that may be binary, without bias; arguments as of `nn.Conv2d`."""
        if self.binary_weights:
            return BinaryConv2d(*args, bias=False, latent_init=self.latent_init, **kwargs)
        return LatentConv2d(*args, bias=False, **kwargs)

    def scaled(self, counts: Sequence[int]) -> list[int]:
        """Channel counts times `width`: the first is rounded, the others stay its multiples."""
        first = round(counts[0] * self.width)
        if first < 1:
            raise UserError(f"width {self.width} leaves no channel: give at least {1 / counts[0]}")
        return [first * count // counts[0] for count in counts]


def binary_convolutions(model: nn.Module) -> dict[str, BinaryConv2d]:
    """Name -> module, in the order they are defined."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryConv2d)}
