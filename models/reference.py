"""The binary networks composed from elementary operations, as such code is usually written.

Masks in floats, the detach trick, one pass per operation.  The autograd Functions of
`utils.binarize` are tested against this and timed beside it (`python -m scripts.benchmarks.speed`).
At single points they differ: torch.sign(0) is 0, and the clip's gradient at exactly +-1 is 1 here.

    y = f(x).detach() - g(x).detach() + g(x)     is f(x) forward and has the gradient of g backward
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import AvgPool2x2, GlobalAvgPool
from utils.binarize import BinaryConv2d, RPReLU, Sign


def sign_polynomial(x: Tensor) -> Tensor:
    """Sign forward; backward through the piecewise polynomial whose derivative is the STE."""
    below = (x < -1).float()
    negative = (x < 0).float()
    not_above = (x < 1).float()
    y = -1 * below + (x * x + 2 * x) * (1 - below)
    y = y * negative + (-x * x + 2 * x) * (1 - negative)
    y = y * not_above + 1 * (1 - not_above)
    return torch.sign(x).detach() - y.detach() + y


def sign_clip(x: Tensor, bound: float = 1.0) -> Tensor:
    """Sign forward; backward through the clip."""
    y = torch.clamp(x, -bound, bound)
    return torch.sign(x).detach() - y.detach() + y


SIGNS = {
    "polynomial": sign_polynomial,
    "clip": sign_clip,
    "clip_1.3": partial(sign_clip, bound=1.3),
}


def binarize_weight(w: Tensor) -> Tensor:
    """Mean of each output channel times Sign forward, to a rounding; backward through the clip."""
    scale = w.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True).detach()
    clipped = torch.clamp(w, -1.0, 1.0)
    return (scale * torch.sign(w)).detach() - clipped.detach() + clipped


class ReferenceSign(Sign):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift.expand_as(x)
        return SIGNS[self.ste](x)


class ReferenceRPReLU(RPReLU):
    def forward(self, x: Tensor, before=None, after=None) -> Tensor:
        x = x if before is None else x + before.expand_as(x)
        x = F.prelu(x, self.weight)
        return x if after is None else x + after.expand_as(x)


class ReferenceBinaryConv2d(BinaryConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, binarize_weight(self.weight), None, self.stride, self.padding)


REFERENCE = {
    Sign: ReferenceSign,
    RPReLU: ReferenceRPReLU,
    BinaryConv2d: ReferenceBinaryConv2d,
    AvgPool2x2: nn.AvgPool2d,
    GlobalAvgPool: nn.AdaptiveAvgPool2d,
}


def to_reference(model: nn.Module) -> nn.Module:
    """A copy of a network whose binary layers are composed from elementary operations."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = REFERENCE.get(type(module), type(module))
    return model
