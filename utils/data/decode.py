"""Pixels of image files, by Pillow or, of JPEGs, only those that a crop needs, and the same ones.

EXIF orientations are ignored and all else is converted to RGB, as in the released code.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from utils.run.errors import UserError

DECODERS = ("pil", "nvimagecodec")
END_OF_JPEG = b"\xff\xd9"
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded

# nvImageCodec decodes a column of one pixel on its own wrongly where chroma is subsampled.
_NARROWEST = 16


def whole_image(path: str | Path) -> Image.Image:
    """An image file, decoded, as RGB.

    Raises:
        UserError: it cannot be decoded.
    """
    with _decoding(path), Path(path).open("rb") as file:
        image = Image.open(file)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


class CroppedImage:
    """An image file of which only the header is decoded, until `crop` tells what else is needed.

    Raises:
        UserError: it is no image.
    """

    def __init__(self, path: str | Path):
        self.path = path
        with _decoding(path):
            self.file = Path(path).read_bytes()
            self.image = Image.open(io.BytesIO(self.file))
        self.size = self.image.size

    def crop(self, box: Box) -> np.ndarray | Image.Image:
        """The pixels in `box`: (height, width, 3) bytes, or an RGB image.

        Raises:
            UserError: they cannot be decoded.
        """
        # A file without its end is Pillow's to judge, wherever the crop lies.
        is_whole_jpeg = self.image.format == "JPEG" and self.file.endswith(END_OF_JPEG)
        if is_whole_jpeg and self.image.mode in ("RGB", "L") and box[2] - box[0] >= _NARROWEST:
            pixels = self._region(box)
            if pixels is not None:
                return pixels
        return self._of_whole_image(box)

    def _of_whole_image(self, box: Box) -> Image.Image:
        with _decoding(self.path):
            return self.image.crop(box).convert("RGB")

    def _region(self, box: Box) -> np.ndarray | None:
        """None where nvImageCodec gives up; Pillow then tells whether the image can be read."""
        codec = nvimagecodec()
        left, top, right, bottom = box
        region = codec.Region(top, left, bottom, right)
        stream = codec.CodeStream(self.file).get_sub_code_stream(region=region)
        options = codec.DecodeParams(apply_exif_orientation=False)
        pixels = _region_decoder(os.getpid()).decode(stream, params=options)
        return None if pixels is None else np.asarray(pixels.cpu())


@contextlib.contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for a file it cannot decode
        if reason := getattr(error, "strerror", None):  # an OSError of the system
            raise UserError(f"cannot read image {path}: {reason}") from error
        name = type(error).__name__
        raise UserError(f"cannot decode image {path} ({name}): repair or remove it") from error


def nvimagecodec() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what it gives up, Pillow reports
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise UserError(
            "decoder nvimagecodec needs the package nvidia-nvimgcodec:"
            " python -m pip install -r requirements-decoder.txt"
        ) from error
    return nvimgcodec


@functools.cache
def _region_decoder(process: int):
    """One for each process, because its thread does not outlive a fork."""
    codec = nvimagecodec()
    return codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[codec.Backend(codec.CPU_ONLY)],
        options=":fancy_upsampling=1 :fast_idct=0",  # as Pillow decodes
    )
