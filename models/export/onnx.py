"""ONNX: write a network, and run a written one with onnxruntime as if it were a module."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.export.exported import INPUT, OUTPUT, VAL_RESIZE, ExportedNetwork, import_engine
from models.export.fold import to_plain_convs
from utils.checkpoint.files import atomic_write

SUFFIX = ".onnx"
PACKAGES = ("requirements-export.txt", "onnxruntime", "onnx", "onnxscript")


def write_onnx(
    model: nn.Module, path: Path, image_size: int, batch: int | None, val_resize: int
) -> None:
    """Export `model` in eval mode, weights as plain convolutions: images (N, 3, S, S) -> logits.

    Args:
        batch: N; None leaves it dynamic.
        val_resize: shorter side of validation images before the central crop, kept as metadata.

    Raises:
        UserError: a package is missing, or no room.
    """
    import_engine(*PACKAGES)
    # Two images, because the exporter takes a dimension of 1 for a constant.
    example = torch.zeros(batch or 2, 3, image_size, image_size)
    program = torch.onnx.export(
        to_plain_convs(model),
        (example,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    network = program.model_proto
    network.metadata_props.add(key=VAL_RESIZE, value=str(val_resize))
    atomic_write(path, lambda file: file.write(network.SerializeToString()))


class OnnxNetwork(ExportedNetwork):
    """A network that onnxruntime computes."""

    engine_name = "onnxruntime"

    def open(self, path: Path) -> None:
        runtime = import_engine(*PACKAGES)
        self.session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (self.input,) = self.session.get_inputs()
        batch, _, self.image_size, _ = self.input.shape
        self.batch = batch if isinstance(batch, int) else None
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.val_resize = int(metadata.get(VAL_RESIZE, self.image_size))

    def run(self, pixels: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.input.name: pixels})[0]
