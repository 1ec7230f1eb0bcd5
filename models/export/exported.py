"""Networks written for an engine, run as if they were modules."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from utils.run.errors import UserError

INPUT, OUTPUT = "images", "logits"
VAL_RESIZE = "val_resize"  # metadata: shorter side of validation images before the central crop


def import_engine(requirements: str, *packages: str) -> ModuleType:
    """Import the packages that a form of export needs, and return the first of them."""
    try:
        modules = [importlib.import_module(package) for package in packages]
        return modules[0]
    except ImportError as error:
        raise UserError(
            f"this form needs the package {error.name}: python -m pip install -r {requirements}"
        ) from error


class ExportedNetwork(nn.Module):
    """(N, 3, S, S) images -> (N, classes) logits, computed on the CPU.

    Subclasses name their engine; `open` sets `image_size` S, `val_resize` and `batch`, the N that
    the file is for or None, and `run` computes one batch.

    Raises:
        UserError: another or a damaged file, a package is missing, or no engine to be trusted.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        try:
            self.open(path)
        except UserError:
            raise
        except Exception as error:  # engines raise whatever the damaged bytes happen to mean
            raise UserError(
                f"{path} is not a network of images for {self.engine_name}, or a damaged one"
                f" ({type(error).__name__}): convert it again"
            ) from error

    @property
    def model(self) -> nn.Module:
        """Itself, under the name that `LoadedNetwork` has for its network."""
        return self

    def __str__(self) -> str:
        return str(self.path)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S)
        if images.shape[-1] != self.image_size:
            raise UserError(
                f"{self} computes images of {self.image_size} pixels, not {images.shape[-1]}: leave"
                " --image_size out, or convert the checkpoint with it"
            )
        pixels = images.cpu().numpy()
        batch = self.batch or len(pixels)
        padding = pixels[:1].repeat(-len(pixels) % batch, axis=0)
        batches = np.concatenate([pixels, padding]).reshape(-1, batch, *pixels.shape[1:])
        logits = np.concatenate([self.run(pixels) for pixels in batches])[: len(images)]
        return torch.from_numpy(logits).to(images.device)  # (N, classes)
