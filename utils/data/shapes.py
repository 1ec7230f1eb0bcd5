"""The built-in data set: ten classes of 32x32 drawings, so that everything runs without a download.

Every drawing varies in position, scale, rotation, colour, background, clutter and noise, as a
function of (split, class, index) alone.  `write_shapes` lays them out like ImageNet,
`{train,val}/<class>/*.png`, so that they take the same loading path.
"""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
_SUPERSAMPLING = 4
_SPLITS = {"train": 600, "val": 100}  # images of each class


def _regular(corners: int, radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=float)


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


_STAR = _regular(10) * np.tile([1, 0.42], 5)[:, None]
_PLUS = [_box(-1, -0.3, 1, 0.3), _box(-0.3, -1, 0.3, 1)]

# Each class in the unit disc: polygons to fill, then polygons to cut out.
SHAPES: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {
    "bars": ([_box(-0.9, y - 0.18, 0.9, y + 0.18) for y in (-0.7, 0, 0.7)], []),
    "cross": ([_turned(bar, np.pi / 4) for bar in _PLUS], []),
    "disc": ([_regular(32)], []),
    "dots": ([_regular(16, 0.38, x, y) for x in (-0.55, 0.55) for y in (-0.55, 0.55)], []),
    "frame": ([_box(-0.85, -0.85, 0.85, 0.85)], [_box(-0.45, -0.45, 0.45, 0.45)]),
    "plus": (_PLUS, []),
    "ring": ([_regular(32)], [_regular(32, 0.55)]),
    "square": ([_box(-0.85, -0.85, 0.85, 0.85)], []),
    "star": ([_STAR], []),
    "triangle": ([_regular(3)], []),
}


def _background(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A gradient of `colour` in a random direction, (SIZE, SIZE, 3) on the 0-255 scale."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    return colour + ramp[..., None] * rng.uniform(-90, 90, size=3)


def _coverage(rng: np.random.Generator, fill, cut, radius: float, centre, angle: float):
    """How much of each pixel the turned, scaled, moved polygons cover, (SIZE, SIZE, 1) in 0-1."""
    canvas = Image.new("L", (SIZE * _SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for polygons, value in ((fill, 255), (cut, 0)):
        for points in polygons:
            placed = (_turned(points, angle) * radius + centre) * _SUPERSAMPLING
            draw.polygon([tuple(point) for point in placed], fill=value)
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=float)[..., None] / 255


def draw_shape(split: str, name: str, index: int) -> Image.Image:
    """Draw image `index` of class `name` in `split` ("train" or "val")."""
    rng = np.random.default_rng([list(_SPLITS).index(split), list(SHAPES).index(name), index])
    ground = rng.uniform(40, 215, size=3)
    image = _background(rng, ground)
    for _ in range(rng.integers(0, 5)):
        speck = _coverage(
            rng, [_regular(rng.integers(3, 7))], [], rng.uniform(1, 3), rng.uniform(0, SIZE, 2), 0
        )
        image = image + speck * rng.uniform(-80, 80, size=3)

    radius = rng.uniform(6, 13)
    centre = rng.uniform(radius, SIZE - radius, size=2)
    coverage = _coverage(rng, *SHAPES[name], radius, centre, rng.uniform(-0.3, 0.3))
    ink = ground + rng.choice([-1, 1], size=3) * rng.uniform(50, 120, size=3)
    image = image * (1 - coverage) + ink * coverage
    image = image + rng.normal(0, rng.uniform(2, 20), size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def draw_set(
    folder: Path, classes: Iterable[str], counts: Mapping[str, int], file_name: str
) -> None:
    """Draw the first images of each class of each split: `folder`/SPLIT/CLASS/FILE.

    Args:
        counts: split -> images of each class.
        file_name: made from an image's index; its suffix is the format.
    """
    for split, count in counts.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                path = folder / split / name / file_name.format(index)
                draw_shape(split, name, index).save(path)


def write_shapes(folder: Path) -> None:
    """Draw the whole set into `folder`, which appears complete or not at all."""
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        draw_set(unfinished, SHAPES, _SPLITS, "{:04d}.png")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
