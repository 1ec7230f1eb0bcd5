"""Binarization: Sign with its straight-through estimators, and the scaled weight binarizer.

Each autograd Function is the equation forward and the estimator's gradient backward; the
functional form beside it is what the networks call, `Sign` and `BinaryConv2d` are thin modules
over those.  Sign maps 0 to +1 (the released code, through `torch.sign`, leaves it at 0), so its
output has two values and no third.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.errors import InputError


def _sign(x: Tensor) -> Tensor:
    """-1 where x < 0, +1 elsewhere (also at 0 and -0.0), in x's shape and dtype."""
    # Comparing into floats: on a CPU, ten times faster than torch.where.
    return torch.lt(x, 0, out=torch.empty_like(x)).mul_(-2).add_(1)


class SignPolynomialSTE(torch.autograd.Function):
    """y = Sign(x);  dy/dx := 2 + 2x on [-1, 0),  2 - 2x on [0, 1),  0 elsewhere."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.abs().mul_(-2).add_(2).clamp_(min=0).mul_(grad)


class SignClipSTE(torch.autograd.Function):
    """y = Sign(x);  dy/dx := 1 on -1 < x < 1,  0 elsewhere."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.lt(x.abs(), 1, out=torch.empty_like(x)).mul_(grad)


class ScaledSignClipSTE(torch.autograd.Function):
    """w_b[o] = mean|w[o]| * Sign(w[o]);  dL/dw := dL/dw_b * 1[|w| <= 1], the mean a constant."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return _sign(w) * channel_scale(w)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad * (w.abs() <= 1)


def sign_polynomial(x: Tensor) -> Tensor:
    """Sign with the polynomial STE of Bi-Real Net, the activation gradient of the released code.

    >>> x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], requires_grad=True)
    >>> y = sign_polynomial(x); y.sum().backward(); y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 1.0, 0.0])
    """
    return SignPolynomialSTE.apply(x)


def sign_clip(x: Tensor) -> Tensor:
    """Sign with the clip STE, the activation gradient of the paper's equations.

    >>> x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], requires_grad=True)
    >>> y = sign_clip(x); y.sum().backward(); y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0])
    """
    return SignClipSTE.apply(x)


def channel_scale(w: Tensor) -> Tensor:
    """Mean |w| over each output channel: (O, I, kH, kW) -> (O, 1, 1, 1)."""
    return w.abs().mean(dim=(1, 2, 3), keepdim=True)


def is_binary(x: Tensor) -> bool:
    """Every value is exactly -1 or +1."""
    return bool((x.abs() == 1).all())


def binarize_weight(w: Tensor) -> Tensor:
    """Latent weights (O, I, kH, kW) -> one magnitude per output channel times +-1, same shape.

    >>> w = torch.tensor([[[[0.5, -1.5]]]], requires_grad=True)
    >>> y = binarize_weight(w); y.sum().backward(); y.tolist(), w.grad.tolist()
    ([[[[1.0, -1.0]]]], [[[[1.0, 0.0]]]])
    """
    return ScaledSignClipSTE.apply(w)


ACTIVATION_STES = {"polynomial": sign_polynomial, "clip": sign_clip}
LATENT_INITS = ("positive", "symmetric")


class Sign(nn.Module):
    """Binarize activations of any shape; `ste` is "polynomial" or "clip"."""

    def __init__(self, ste: str = "polynomial"):
        super().__init__()
        if ste not in ACTIVATION_STES:
            raise InputError(
                f"unknown activation_ste {ste!r}: choose one of {', '.join(ACTIVATION_STES)}"
            )
        self.ste = ste

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATION_STES[self.ste](x)

    def extra_repr(self) -> str:
        return f"ste={self.ste!r}"


class LatentConv2d(nn.Conv2d):
    """A convolution whose weights are binary in the end, and are still used as real ones."""


class BinaryConv2d(LatentConv2d):
    """A convolution whose `weight` holds the latent weights and convolves their binarized form.

    `latent_init` is "positive", `rand * 0.001` as in the released code (so that training from
    scratch starts with every sign at +1), or "symmetric", the default init of `nn.Conv2d`.
    """

    def __init__(self, *args, latent_init: str = "positive", **kwargs):
        if latent_init not in LATENT_INITS:
            raise InputError(
                f"unknown latent_init {latent_init!r}: choose one of {', '.join(LATENT_INITS)}"
            )
        self.latent_init = latent_init
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.latent_init == "positive":
            nn.init.uniform_(self.weight, 0, 0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, binarize_weight(self.weight), self.bias)
