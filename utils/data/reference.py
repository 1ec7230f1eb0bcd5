"""The released transforms in their own order, one image at a time, which the fast ones equal."""

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD


class ReferenceLighting:
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
            ReferenceLighting(scale),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
