"""Trained networks as exact +-1 weights, ONNX or OpenVINO.  No training imports this."""

from pathlib import Path
from typing import Any

from models.checkpoints import LoadedNetwork, load_network
from models.export import onnx, openvino
from models.export.exported import ExportedNetwork

EXPORTED = {onnx.SUFFIX: onnx.OnnxNetwork, openvino.SUFFIX: openvino.OpenVinoNetwork}


def open_network(path: Path | str, **given: Any) -> LoadedNetwork | ExportedNetwork:
    """Open a checkpoint, ONNX or OpenVINO file; `given` and errors are those of `load_network`."""
    path = Path(path)
    if path.suffix in EXPORTED:
        return EXPORTED[path.suffix](path)
    return load_network(path, **given)
