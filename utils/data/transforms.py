"""The released transforms, split in two: bytes in the loading workers, floats on the device.

Loading ends with bytes, a pixel's three side by side as in Pillow.  `normalize_batch` makes colour
planes, colour noise and normalisation of whole batches, with the very numbers that the released
order of transforms gives.  `crop_batch` crops there as well, for a small data set that lies there.
"""

import functools
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2.functional import resize

from utils.data.decode import CroppedImage

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TrainTransform:
    """RGB image -> its bytes (size, size, 3), and what Lighting adds to each channel, (3,).

    Randomness is drawn in the released order, crop, lighting, flip; flipping a channel and adding
    to it commute.  Of a `CroppedImage` no more than the crop is decoded.

    Args:
        config: its `image_size`, `crop_scale`, `resize` and `lighting`.
    """

    def __init__(self, config):
        self.crop = transforms.RandomResizedCrop(config.image_size, scale=(config.crop_scale, 1.0))
        self.size = config.image_size
        self.resize = RESIZE[config.resize]
        self.lighting = LIGHTING[config.lighting]

    def __call__(self, image: Image.Image | CroppedImage) -> tuple[Tensor, Tensor]:
        pixels = self.resize(image.crop(self.box(image.size)), self.size)
        shift = self.lighting()
        flips = torch.rand(1) < 0.5
        return pixels.flip(1) if flips else pixels, shift

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """A random crop of an image of (width, height): left, top, right, bottom."""
        width, height = size
        shape = torch.empty(3, height, width, device="meta")
        top, left, rows, columns = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
        return left, top, left + columns, top + rows

    def draw(self, count: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a call draws, for `count` images of side x side pixels at once; other draws.

        Returns:
            crops (n, 4), each top, left, rows and columns, flips (n,), channel shifts (n, 3).
        """
        attempts = 10, count  # as in torchvision
        area = side**2 * torch.empty(attempts).uniform_(*self.crop.scale)
        ratio = torch.empty(attempts).uniform_(*map(math.log, self.crop.ratio)).exp()
        sizes = torch.stack([area / ratio, area * ratio]).sqrt().round()  # rows, columns
        fits = ((sizes > 0) & (sizes <= side)).all(0)
        first = fits.int().argmax(0)
        sizes = sizes[:, first, torch.arange(count)].where(fits.any(0), side)
        starts = (torch.rand(2, count) * (side - sizes + 1)).floor()
        return torch.cat([starts, sizes]).T, torch.rand(count) < 0.5, self.lighting(count)

    def crop_batch(self, pixels: Tensor, crops: Tensor, flips: Tensor, shifts: Tensor) -> Tensor:
        """Bytes (n, 3, side, side) and what `draw` gives -> normalised floats (n, 3, size, size).

        Antialiased bilinear as Pillow's, columns first, each pass rounded; a byte may differ by 2.
        """
        top, left, rows, columns = crops.T
        down = _resize_weights(top, rows, pixels.shape[2], self.size)
        across = _resize_weights(left, columns, pixels.shape[3], self.size)
        across = torch.where(flips[:, None, None], across.flip(1), across)
        narrowed = (pixels.float() @ across.mT[:, None] + 0.5).floor_()  # (n, 3, side, size)
        return normalize((down[:, None] @ narrowed + 0.5).floor_(), shifts)


class ValTransform:
    """Resize the shorter side, crop the centre: PIL image -> as `TrainTransform`, without noise.

    Args:
        config: its `val_resize` and `image_size`; a loaded network has them as well.
    """

    def __init__(self, config):
        self.resize = transforms.Resize(config.val_resize)
        self.crop = transforms.CenterCrop(config.image_size)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return bytes_of(self.crop(self.resize(image))), no_lighting()


def normalize_batch(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Bytes (n, S, S, 3) and channel shifts (n, 3) -> normalised floats (n, 3, S, S)."""
    return normalize(pixels.permute(0, 3, 1, 2).contiguous(), shifts)


def normalize(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Values 0 to 255, (n, 3, S, S), and channel shifts (n, 3) -> normalised floats."""
    if shifts.is_cuda or shifts.any():
        pixels = (pixels.to(torch.int16) + shifts[:, :, None, None]).clamp_(0, 255)
    mean, std = _mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def _resize_weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """How much of each of `side` pixels goes into each of `size`, (n, size, side).

    A triangle around its centre in the part resized, which begins at `start` (n,) and is `length`
    (n,) long, and as wide as a step or a pixel there.
    """
    step = (length / size)[:, None, None]
    place = torch.arange(max(side, size), device=start.device) + 0.5
    centres = start[:, None, None] + place[:size, None] * step  # (n, size, 1)
    weights = (1 - (place[:side] - centres).abs() / step.clamp(min=1)).clamp_(min=0)
    end = start + length
    inside = (place[:side] > start[:, None]) & (place[:side] < end[:, None])  # (n, side)
    weights = weights * inside[:, None]
    return weights / weights.sum(2, keepdim=True)


@functools.cache  # so that no batch waits for a GPU
def _mean_and_std(device: torch.device) -> Tensor:
    """ImageNet's, (2, 3, 1, 1)."""
    return torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=device)[:, :, None, None]


class Lighting:
    """PCA colour noise (Krizhevsky et al. 2012): draws what to add to each channel's bytes.

    increment = V (alpha * lambda), alpha ~ Normal(0, std) per component.  The eigenvalues belong
    to the 0-1 scale.  With `scale=1`, the released code, the increment is added on the 0-255
    scale and truncated, so that a channel changes by 0 or -1 only; `scale=255` is the textbook.
    Truncating byte + increment is adding the increment's floor, the whole number returned.
    """

    EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
    EIGENVECTORS = torch.tensor(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ],
        dtype=torch.float64,
    )

    def __init__(self, std: float = 0.1, scale: float = 1.0):
        self.std = std
        self.scale = scale

    def __call__(self, *count: int) -> torch.Tensor:
        """(3,) int16; with a count (n, 3)."""
        alpha = torch.randn(*count, 3, dtype=torch.float64) * self.std
        weights = (alpha * self.EIGENVALUES)[..., None, :]
        return (self.scale * (self.EIGENVECTORS * weights).sum(-1)).floor().to(torch.int16)


def no_lighting(*count: int) -> torch.Tensor:
    return torch.zeros(*count, 3, dtype=torch.int16)


LIGHTING = {"released": Lighting(scale=1.0), "textbook": Lighting(scale=255.0), "none": no_lighting}


def bytes_of(image: Image.Image | np.ndarray) -> Tensor:
    """An RGB image or its bytes -> a tensor of its own, (height, width, 3)."""
    return torch.from_numpy(np.array(image))


def resized_by_pillow(crop: Image.Image | np.ndarray, size: int) -> Tensor:
    """Antialiased bilinear, as released: an RGB image or its bytes -> bytes (size, size, 3)."""
    image = crop if isinstance(crop, Image.Image) else Image.fromarray(crop)
    return bytes_of(image.resize((size, size), Image.Resampling.BILINEAR))


def resized_by_torch(crop: Image.Image | np.ndarray, size: int) -> Tensor:
    """The same filter with coefficients of 16 bits: a byte may differ, by at most 2."""
    pixels = resize(bytes_of(crop).permute(2, 0, 1), [size, size], antialias=True)
    return pixels.permute(1, 2, 0).contiguous()


RESIZE = {"pil": resized_by_pillow, "torch": resized_by_torch}
