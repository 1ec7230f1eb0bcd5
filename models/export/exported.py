"""Networks written for an engine, run as if they were modules."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

INPUT, OUTPUT = "images", "logits"
VAL_RESIZE = "val_resize"  # metadata: shorter side of validation images before the central crop


class ExportedNetwork(nn.Module):
    """(N, 3, S, S) images -> (N, classes) logits, computed on the CPU.

    Subclasses set `path`, `image_size` S, `val_resize`, and `batch`, the N that the file is for or
    None; they compute one batch in `run`.
    """

    path: Path
    image_size: int
    val_resize: int
    batch: int | None
    run: Callable[[np.ndarray], np.ndarray]

    @property
    def model(self) -> nn.Module:
        """What answers, under the name it has in `LoadedNetwork`."""
        return self

    def __str__(self) -> str:
        return str(self.path)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.cpu().numpy()
        fixed = self.batch or len(pixels)
        logits = []
        for start in range(0, len(pixels), fixed):
            part = pixels[start : start + fixed]
            padded = np.concatenate([part, part[:1].repeat(fixed - len(part), axis=0)])
            logits.append(self.run(padded)[: len(part)])
        return torch.from_numpy(np.concatenate(logits)).to(images.device)
