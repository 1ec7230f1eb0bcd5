"""Binarization: Sign with its straight-through estimators, and the scaled weight binarizer.

    Sign(x) = -1 if x < 0 else +1                 activations and latent weights
    RSign(x) = Sign(x + b)                        one threshold b per channel (ReActNet)
    w_b[o] = mean|w[o]| * Sign(w[o])              weights of output channel o
    RPReLU(x) = PReLU(x + b1) + b2                slope and shifts per channel (ReActNet)

Each autograd Function computes the equation in `forward` and the estimator's gradient in
`backward`, and saves only its inputs (under autocast in its dtype); `models/reference.py` composes
the same from elementary operations.  Sign(0) is +1, so that there are exactly two values; the
released code uses `torch.sign`, where it is 0.

Under autocast, Sign and the binary convolution return the lower precision, in which -1 and +1 are
exact.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.run.errors import UserError


class SignSTE(torch.autograd.Function):
    """y = Sign(a), a = x + b;  dy/da := the derivative in `ACTIVATION_STES` that `ste` names.

    b is one threshold per channel, or None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor | None, ste: str) -> Tensor:
        ctx.dtype, dtype = x.dtype, _autocast_dtype(x)
        ctx.ste = ste
        ctx.save_for_backward(x.to(dtype), shift)
        return _sign(add_shift(x, shift), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, shift = ctx.saved_tensors
        a = add_shift(x.to(ctx.dtype), shift)
        grad = ACTIVATION_STES[ctx.ste](a).mul_(grad)
        (grad_shift,) = sum_per_channel((shift, grad))
        return grad, grad_shift, None


def clip_derivative(a: Tensor) -> Tensor:
    """1 on -1 < a < 1,  0 elsewhere.  The paper's equation."""
    return _ones_where(torch.lt, a.abs(), 1)


def wide_clip_derivative(a: Tensor) -> Tensor:
    """1 on -1.3 <= a <= 1.3,  0 elsewhere.  MeliusNet's."""
    return _ones_where(torch.le, a.abs(), 1.3)


def polynomial_derivative(a: Tensor) -> Tensor:
    """2 + 2a on [-1, 0),  2 - 2a on [0, 1),  0 elsewhere.  The released code's (Bi-Real Net)."""
    return a.abs().mul_(-2).add_(2).clamp_(min=0)


# Gradient of Sign by name: a function of its input that returns a new tensor.
ACTIVATION_STES = {
    "polynomial": polynomial_derivative,
    "clip": clip_derivative,
    "clip_1.3": wide_clip_derivative,
}


class ScaledSignClipSTE(torch.autograd.Function):
    """w_b[o] = mean|w[o]| * Sign(w[o]);  dL/dw := dL/dw_b * 1[|w| <= 1], the mean a constant."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return _scaled_sign(w, w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return clip_weight_gradient(grad, w)


class BinaryConvolution(torch.autograd.Function):
    """y = conv(x, w_b) = conv(x, Sign(w)) * mean|w|;  dL/dw := dL/dw_b * 1[|w| <= 1].

    The scale comes after the convolution.  The sums of `binary_inputs`, -1 and +1, are then whole
    numbers, exact in any order of summation: a sum of 0 is exactly 0, and a PReLU behind it takes
    the right slope.  bfloat16 holds these sums exactly up to 256, and rounds larger ones.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, binary_inputs: bool, *geometry) -> Tensor:
        ctx.geometry = geometry  # stride, padding, dilation, groups
        dtype = _autocast_dtype(x)
        x = x.to(dtype)
        ctx.save_for_backward(x, w)
        y = F.conv2d(x, _sign(w, dtype), None, *ctx.geometry)
        if binary_inputs and dtype == torch.float32:
            # Some algorithms of cuDNN, such as Winograd's, round on their way.
            y = torch.round(y, out=_overwrite(y))
        y = torch.mul(y, channel_scale(w).view(1, -1, 1, 1), out=_overwrite(y))
        return to_dtype(y, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        kernel = _scaled_sign(w, x.dtype)
        stride, padding, dilation, groups = ctx.geometry
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, stride, padding, dilation, False, [0, 0], groups, needed
        )
        if grad_w is not None:
            grad_w = clip_weight_gradient(grad_w, w)
        return grad_x, grad_w, None, None, None, None, None


class RPReLUFunction(torch.autograd.Function):
    """y = PReLU(a) + b2 with a = x + b1, slope and shifts per channel; a shift may be None.

    dy/dx = 1 where a > 0, else slope;  dy/dslope = min(a, 0).  Under autocast y has the dtype of
    the slope, or with `low_precision` that of autocast.
    """

    @staticmethod
    def forward(ctx, x: Tensor, before, slope: Tensor, after, low_precision: bool):
        ctx.dtype = x.dtype
        ctx.save_for_backward(x.to(_autocast_dtype(x)), before, slope, after)
        with torch.autocast(x.device.type, enabled=False):  # the residual path keeps its precision
            y = F.prelu(add_shift(x, before).to(slope.dtype), slope)
        y = y if after is None else torch.add(y, after, out=_overwrite(y))
        return to_dtype(y, _autocast_dtype(x)) if low_precision else y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, before, slope, after = ctx.saved_tensors
        a = add_shift(x, before).to(slope.dtype)
        of_negative = _ones_where(torch.le, a, 0).mul_(grad)
        slope_less_1 = slope.view(-1, *[1] * (x.ndim - 2)) - 1
        grad_x = torch.addcmul(grad, of_negative, slope_less_1)
        grad_before, grad_slope, grad_after = sum_per_channel(
            (before, grad_x), (slope, of_negative.mul_(a)), (after, grad)
        )
        return grad_x.to(ctx.dtype), grad_before, grad_slope, grad_after, None


def sign(x: Tensor, shift: Tensor | None = None, ste: str = "polynomial") -> Tensor:
    """Sign(x), or RSign(x) = Sign(x + b), with the gradient that `ste` names.

    >>> x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], requires_grad=True)
    >>> y = sign(x, ste="clip"); y.sum().backward(); y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0])
    >>> x.grad = None
    >>> y = sign(x, ste="polynomial"); y.sum().backward(); y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 1.0, 0.0])
    """
    return SignSTE.apply(x, shift, ste)


def binarize_weight(w: Tensor) -> Tensor:
    """Latent weights (O, I, kH, kW) -> one magnitude per output channel times +-1, same shape.

    >>> w = torch.tensor([[[[0.5, -1.5]]]], requires_grad=True)
    >>> y = binarize_weight(w); y.sum().backward(); y.tolist(), w.grad.tolist()
    ([[[[1.0, -1.0]]]], [[[[1.0, 0.0]]]])
    """
    return ScaledSignClipSTE.apply(w)


def clip_weight_gradient(grad: Tensor, w: Tensor) -> Tensor:
    """grad * 1[|w| <= 1], in the dtype of w."""
    return _ones_where(torch.le, w.abs(), 1).mul_(grad)


def channel_scale(w: Tensor) -> Tensor:
    """Mean |w| of each output channel: (O, I, kH, kW) -> (O, 1, 1, 1)."""
    return w.abs().mean(dim=(1, 2, 3), keepdim=True)


LATENT_INITS = ("positive", "symmetric")


class Sign(nn.Module):
    """Sign(x), or RSign(x) = Sign(x + b) with a threshold per channel.

    Args:
        ste: gradient of Sign, a key of `ACTIVATION_STES`.

    Raises:
        UserError: an unknown `ste`.
    """

    def __init__(self, ste: str = "polynomial"):
        super().__init__()
        if ste not in ACTIVATION_STES:
            raise UserError(
                f"unknown activation_ste {ste!r}: choose one of {', '.join(ACTIVATION_STES)}"
            )
        self.ste = ste

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return sign(x, shift, self.ste)

    def extra_repr(self) -> str:
        return f"ste={self.ste!r}"


class RPReLU(nn.PReLU):
    """PReLU(x), or RPReLU(x) = PReLU(x + b1) + b2, everything per channel: (N, C, ...) -> same."""

    low_precision = False  # return autocast's dtype, not float32; `place` sets it (residual path)

    def __init__(self, channels: int):
        super().__init__(channels)

    def forward(
        self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        return RPReLUFunction.apply(x, before, self.weight, after, self.low_precision)


class LatentConv2d(nn.Conv2d):
    """A convolution without bias whose weights are real-valued in step 1, binary in step 2.

    Args:
        args, kwargs: of `nn.Conv2d`, but for `bias`; padding is a number of zeros.

    Raises:
        UserError: another padding.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise UserError("a convolution with latent weights pads with a number of zeros")


class BinaryConv2d(LatentConv2d):
    """A convolution with the binarized form of its `weight`, which holds the latent weights.

    (N, C, H, W) -> (N, C', H', W').

    Args:
        args, kwargs: of `LatentConv2d`.
        latent_init: "positive", `rand * 0.001` as in the released code (training from scratch then
            starts with every sign at +1), or "symmetric", the default init of `nn.Conv2d`.
        binary_inputs: whether its inputs are -1 and +1, so that float32 may round its sums, which
            Winograd's algorithm leaves inexact, to whole numbers.

    Raises:
        UserError: an unknown `latent_init`.
    """

    def __init__(self, *args, latent_init: str = "positive", binary_inputs: bool = False, **kwargs):
        if latent_init not in LATENT_INITS:
            raise UserError(
                f"unknown latent_init {latent_init!r}: choose one of {', '.join(LATENT_INITS)}"
            )
        self.latent_init = latent_init
        self.binary_inputs = binary_inputs
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.latent_init == "positive":
            nn.init.uniform_(self.weight, 0, 0.001)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: None) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return BinaryConvolution.apply(x, weight, self.binary_inputs, *geometry)


# Helpers


def add_shift(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """x, or x + b with a shift per channel."""
    return x if shift is None else x + shift


def sum_per_channel(*pairs: tuple[Tensor | None, Tensor]) -> list[Tensor | None]:
    """Gradients of parameters per channel, each the sum of its term (N, C, ...) over all the rest.

    Pairs of parameter and term; None for a parameter that is None.
    """
    terms = [term for parameter, term in pairs if parameter is not None]
    sums = iter(_channel_sums(terms))
    return [None if p is None else next(sums).view(p.shape) for p, _ in pairs]


def to_dtype(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in `dtype`, as a forward pass may end with it."""
    # torch 2.11 compiles a wrong gradient where `to` has nothing to convert.
    return y if y.dtype == dtype else y.to(dtype)


def latent_convolutions(model: nn.Module) -> dict[str, LatentConv2d]:
    """Name -> module, in the order they are defined."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LatentConv2d)}


def binary_convolutions(model: nn.Module) -> dict[str, BinaryConv2d]:
    """Name -> module of those of them that binarize their weights."""
    return {n: m for n, m in latent_convolutions(model).items() if isinstance(m, BinaryConv2d)}


def is_binary(x: Tensor) -> bool:
    """Whether every value is exactly -1 or +1."""
    return bool((x.abs() == 1).all())


def has_exact_weights(model: nn.Module) -> bool:
    """Whether there are binary kernels, all stored as exactly -1 and +1, not as latent weights."""
    convolutions = binary_convolutions(model).values()
    return bool(convolutions) and all(is_binary(conv.weight) for conv in convolutions)


def _sign(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """-1 where x < 0, +1 elsewhere (also at 0 and -0.0), in `dtype` or that of x."""
    negative = _ones_where(torch.lt, x, 0, dtype)
    doubled = torch.mul(negative, -2, out=_overwrite(negative))
    return torch.add(doubled, 1, out=_overwrite(doubled))


def _scaled_sign(w: Tensor, dtype: torch.dtype) -> Tensor:
    return _sign(w, dtype) * channel_scale(w).to(dtype)


def _ones_where(compare, x: Tensor, bound: float, dtype: torch.dtype | None = None) -> Tensor:
    """1 where `compare`, torch.lt or torch.le, holds for x and `bound`, 0 elsewhere; x's dtype."""
    if torch.compiler.is_compiling():
        return compare(x, bound).to(dtype or x.dtype)
    # Comparing straight into floats: on a CPU, several times faster than through booleans.
    return compare(x, bound, out=torch.empty_like(x, dtype=dtype))


def _overwrite(y: Tensor) -> Tensor | None:
    """`out` of an operation on y that may write over it."""
    # torch 2.11 compiles a wrong gradient of a forward pass that writes over its own tensors.
    return None if torch.compiler.is_compiling() else y


def _channel_sums(terms: list[Tensor]) -> Sequence[Tensor]:
    if not terms or terms[0].ndim != 4:
        return [term.sum((0, *range(2, term.ndim))) for term in terms]
    # Sum each image first (a large image in four bands), then add up these partial sums:
    # torch.compile fuses many small sums into the kernel that computes the terms.  A single large
    # sum it would split by itself, which costs an extra kernel.
    height = terms[0].shape[2]
    # Bands on GPUs only: torch 2.11 compiles them into code that crashes on a CPU.
    bands = 4 if terms[0].is_cuda and height > 64 and height % 4 == 0 else 1
    partial = [term.unflatten(2, (bands, -1)).sum((3, 4)) for term in terms]  # (N, C, bands) each
    return torch.stack(partial).sum((1, 3))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast computes convolutions of `x` in; its own dtype without autocast."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
