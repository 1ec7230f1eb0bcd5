"""The network of any file that can answer: a checkpoint, ONNX or OpenVINO."""

from pathlib import Path
from typing import Any

from models.checkpoints import LoadedNetwork, load_network
from models.export.exported import ExportedNetwork
from models.export.onnx import SUFFIX as ONNX_SUFFIX
from models.export.onnx import OnnxNetwork
from models.export.openvino import SUFFIX as OPENVINO_SUFFIX
from models.export.openvino import OpenVinoNetwork

EXPORTED = {ONNX_SUFFIX: OnnxNetwork, OPENVINO_SUFFIX: OpenVinoNetwork}


def open_network(path: Path, **given: Any) -> LoadedNetwork | ExportedNetwork:
    """Open a file by its suffix.

    Args:
        given: options of the network, as of `load_network`.

    Raises:
        UserError: as `load_network`, or the engine's reasons.
    """
    if path.suffix in EXPORTED:
        return EXPORTED[path.suffix](path)
    return load_network(path, **given)
