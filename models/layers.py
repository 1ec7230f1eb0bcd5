"""The options of the binary networks, and the small layers that they share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.binarize import BinaryConv2d, LatentConv2d, Sign, add_shift, sum_per_channel, to_dtype
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
        ctx.layout = memory_format_of(x)
        return F.avg_pool2d(x, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return F.interpolate(grad / 4, scale_factor=2).contiguous(memory_format=ctx.layout)


class AvgPool2x2(nn.AvgPool2d):
    """Means of 2x2 windows: (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self):
        super().__init__(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            return super().forward(x)
        # Its own gradient, of which torch.compile makes far faster code than of torch's.
        return _AvgPool2x2Function.apply(x)


class _GlobalAvgPoolFunction(torch.autograd.Function):
    """Means over rows and columns; each pixel's gradient is its share of the mean's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape, ctx.layout = x.shape, memory_format_of(x)
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        grad = grad / (height * width)
        return grad.expand(ctx.shape).contiguous(memory_format=ctx.layout)


class GlobalAvgPool(nn.AdaptiveAvgPool2d):
    """Means over rows and columns: (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        # Its own gradient has the memory layout of x, which the whole backward pass then keeps.
        return _GlobalAvgPoolFunction.apply(x)


class _BatchNormFunction(torch.autograd.Function):
    """y = weight * x_hat + bias with x_hat = (x - mean) / sqrt(var + eps) of the batch.

    Also returns what the running statistics take, mean and unbiased variance, (C,) each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        var, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0, keepdim=True)
        inverse_std = (var + eps).rsqrt()
        ctx.save_for_backward(x, mean, inverse_std, weight, bias)
        y = (x - mean) * (inverse_std * weight.view(mean.shape)) + bias.view(mean.shape)
        count = x.numel() // x.shape[1]
        batch_mean, batch_var = mean.flatten(), var.flatten() * (count / (count - 1))
        ctx.mark_non_differentiable(batch_mean, batch_var)
        return to_dtype(y, x.dtype), batch_mean, batch_var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, mean, inverse_std, weight, bias = ctx.saved_tensors
        x_hat = (x - mean) * inverse_std
        grad_bias, grad_weight = sum_per_channel((bias, grad), (weight, grad * x_hat))
        count = x.numel() // x.shape[1]
        mean_grad, mean_product = (s.view(mean.shape) / count for s in (grad_bias, grad_weight))
        grad_x = (grad - mean_grad - x_hat * mean_product) * (inverse_std * weight.view(mean.shape))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d: (N, C, H, W) -> the same.

    Compiled training writes both passes out in elementary operations, which torch.compile fuses
    with those around them better than torch's own BN.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.compiler.is_compiling():
            return _batch_norm(x, [self], self.weight, self.bias)
        return super().forward(x)


def _batch_norm(x: Tensor, norms: Sequence[nn.BatchNorm2d], weight: Tensor, bias: Tensor) -> Tensor:
    """BN of x with its batch's statistics, which also update the running ones of `norms`.

    x is the inputs of `norms` side by side, an equal share of the channels each; weight and bias
    are theirs, concatenated.
    """
    if torch.compiler.is_compiling():
        y, mean, var = _BatchNormFunction.apply(x, weight, bias, norms[0].eps)
    else:
        mean, var = torch.zeros_like(weight), torch.zeros_like(weight)
        # With momentum=1 these two buffers become the statistics of this batch alone.
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1, eps=norms[0].eps)
    with torch.no_grad():
        shares = zip(norms, mean.chunk(len(norms)), var.chunk(len(norms)), strict=True)
        for norm, batch_mean, batch_var in shares:
            norm.num_batches_tracked.add_(1)
            # Without a momentum, as in `update_bn`, the mean over all batches.
            momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            norm.running_mean.mul_(1 - momentum).add_(batch_mean * momentum)
            norm.running_var.mul_(1 - momentum).add_(batch_var * momentum)
    return y


class RealActivation(nn.Module):
    """Stands where Sign would: x, or x + b with a shift per channel."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return add_shift(x, shift)


class ChannelScale(nn.Module):
    """Takes up the scale of a binary convolution that no BN follows: x, or once folded x * c.

    c, (C, 1, 1), is None in training; only a network of exact weights has it in its state dict.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("channel", None)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        return x if self.channel is None else x * self.channel


@dataclass(frozen=True)
class NetworkOptions:
    """The options of every network, and the layers that depend on them.

    The two flags give four networks of one parameter layout: both off is the real-valued network,
    `binary_activations` alone is step 1, `binary_weights` alone binarizes the weights first, both
    on is step 2.  Stem, shortcuts, BN, shifts, PReLU and `fc` are always real-valued.

    Building a network raises UserError for an unknown `activation_ste` or `latent_init`, and for a
    `width` that leaves no channel, or a number that the network's groups do not divide.
    """

    binary_activations: bool = True  # Sign before each convolution that may be binary
    binary_weights: bool = True  # these convolve with mean|w| * Sign(w) of their latent weights
    activation_ste: str = "polynomial"  # gradient of Sign, a key of ACTIVATION_STES
    width: float = 1.0  # multiplies every channel count
    small_images: bool = False  # for 32 pixels: stride 8, not 32; the head still sees 4x4 positions
    latent_init: str = "positive"  # start of latent weights, as released, or "symmetric"
    latent_scale: float = 1.0  # multiplies them at the start

    def sign(self) -> nn.Module:
        """The layer before a convolution that may be binary."""
        return Sign(self.activation_ste) if self.binary_activations else RealActivation()

    def conv(self, *args, **kwargs) -> LatentConv2d:
        """A convolution that may be binary, without bias; else as `nn.Conv2d`.

        Its input is the output of `sign()` itself, with no pooling or scale in between: in float32
        the sums of binary weights and activations are rounded to whole numbers.
        """
        if not self.binary_weights:
            return LatentConv2d(*args, **kwargs)
        binary = {"latent_init": self.latent_init, "binary_inputs": self.binary_activations}
        conv = BinaryConv2d(*args, **binary, **kwargs)
        conv.weight.data.mul_(self.latent_scale)
        return conv

    def scaled(self, counts: Sequence[int], groups: int = 1) -> list[int]:
        """Channel counts times `width`: the first is rounded, the others stay its multiples.

        `groups` must divide the first.
        """
        first, smallest = round(counts[0] * self.width), groups / counts[0]
        if first < 1:
            raise UserError(f"width {self.width} leaves no channel: give at least {smallest}")
        if first % groups:
            raise UserError(
                f"width {self.width} leaves {first} channels, which {groups} groups do not divide:"
                f" give a multiple of {smallest}, the smallest that works"
            )
        return [first * count // counts[0] for count in counts]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last or contiguous: what a gradient of x (N, C, H, W) should have as well."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def concatenated_conv_bn(
    x: Tensor, convs: Sequence[LatentConv2d], norms: Sequence[nn.BatchNorm2d]
) -> Tensor:
    """Each convolution of the same x (N, C, H, W), then its BN, concatenated along the channels.

    In training one convolution and one BN of the concatenated parameters compute the same: fewer
    and larger kernels, compiled or not, but no hooks of these layers are called.  In eval mode
    each layer is called by itself.
    """
    # Not of nn.SyncBatchNorm, and not of the reference's convolutions.
    is_plain = type(norms[0]) is BatchNorm2d and type(convs[0]) in (LatentConv2d, BinaryConv2d)
    if not (is_plain and all(norm.training for norm in norms)):
        pairs = zip(convs, norms, strict=True)
        return torch.cat([norm(conv(x)) for conv, norm in pairs], dim=1)
    y = convs[0]._conv_forward(x, torch.cat([conv.weight for conv in convs]), None)
    weight, bias = (torch.cat([getattr(n, name) for n in norms]) for name in ("weight", "bias"))
    return _batch_norm(y, norms, weight, bias)
