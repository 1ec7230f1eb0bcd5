"""The same computations composed from elementary operations, as such code is usually written.

Masks in floats, the detach trick, several passes, a transform that ends in floats: an oracle for
the fused functions, and what `scripts/benchmark.py --against composed` compares with.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from models.layers import HalvingPool
from utils.binarize import BinaryConv2d, RPReLU, Sign
from utils.data import IMAGENET_MEAN, IMAGENET_STD


def sign_polynomial(x: Tensor) -> Tensor:
    """Sign forward; backward through the piecewise polynomial whose derivative is the STE."""
    below = (x < -1).float()
    negative = (x < 0).float()
    not_above = (x < 1).float()
    y = -1 * below + (x * x + 2 * x) * (1 - below)
    y = y * negative + (-x * x + 2 * x) * (1 - negative)
    y = y * not_above + 1 * (1 - not_above)
    return torch.sign(x).detach() - y.detach() + y


def sign_clip(x: Tensor) -> Tensor:
    """Sign forward; backward through the clip."""
    y = torch.clamp(x, -1, 1)
    return torch.sign(x).detach() - y.detach() + y


def binarize_weight(w: Tensor) -> Tensor:
    """Mean of each output channel times Sign forward, to a rounding; backward through the clip."""
    scale = w.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True).detach()
    clipped = torch.clamp(w, -1.0, 1.0)
    return (scale * torch.sign(w)).detach() - clipped.detach() + clipped


class ComposedSign(Sign):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift.expand_as(x)
        return sign_polynomial(x) if self.ste == "polynomial" else sign_clip(x)


class ComposedRPReLU(RPReLU):
    def forward(
        self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        x = x if before is None else x + before.expand_as(x)
        x = F.prelu(x, self.weight)
        return x if after is None else x + after.expand_as(x)


class ComposedBinaryConv2d(BinaryConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, binarize_weight(self.weight), None, self.stride, self.padding)


class ComposedHalvingPool(HalvingPool):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True)


COMPOSED = {
    Sign: ComposedSign,
    RPReLU: ComposedRPReLU,
    BinaryConv2d: ComposedBinaryConv2d,
    HalvingPool: ComposedHalvingPool,
}


def composed(model: nn.Module) -> nn.Module:
    """A copy of a network, its fused modules composed from elementary operations."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = COMPOSED.get(type(module), type(module))
    return model


class ComposedLighting:
    """The released colour noise, on the pixels themselves; `scale` 255 is the textbook's."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, image: Image.Image) -> Image.Image:
        alpha = torch.randn(3, dtype=torch.float64).numpy() * 0.1
        values = np.array([0.2175, 0.0188, 0.0045])
        vectors = np.array(
            [
                [-0.5675, 0.7192, 0.4009],
                [-0.5808, -0.0045, -0.8140],
                [-0.5836, -0.6948, 0.4203],
            ]
        )
        increment = self.scale * (vectors * alpha[None] * values[None]).sum(1)
        pixels = np.array(image) + increment
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def train_transform(size: int, crop_scale: float, scale: float = 1.0) -> transforms.Compose:
    """The released order, ending in normalised floats."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(crop_scale, 1.0)),
            ComposedLighting(scale),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
