"""OpenVINO: write a network in its bits, and run a written one as if it were a module.

A written network is `NAME.xml`, the graph, and beside it `NAME.bin`, its constants, whose SHA-256
the graph holds.  Before writing and before reading, the engine's binary convolutions are compared
with integers: some of its releases compute them wrongly, without an error.
"""

import functools
import hashlib
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import nn

from models.export.exported import VAL_RESIZE, ExportedNetwork
from models.export.openvino_graph import build_graph
from models.export.openvino_selftest import PRECISION, TRIED, self_test_layer
from utils.checkpoint.files import atomic_write
from utils.run.errors import UserError

SUFFIX = ".xml"
NOTES, DIGEST = "adambnn", "constants_sha256"
WRONG_RELEASES = ("2026.3.0", "2026.3.1")
INSTALL = "python -m pip install -r requirements-openvino.txt"
NO_KERNELS = "OpenVINO {} has no binary convolutions for this CPU: they need x86-64 with SSE4.1"


def constants_path(path: Path) -> Path:
    """The file beside a graph that holds its constants."""
    return path.with_suffix(".bin")


def load_engine() -> ModuleType:
    """The openvino package, whose binary convolutions are right on this CPU.

    Raises:
        UserError: it is not installed, is a release known to be wrong, or is found to be wrong.
    """
    try:
        import openvino
        import openvino.opset13
    except ImportError as error:
        raise UserError(f"OpenVINO networks need the package openvino: {INSTALL}") from error
    release = openvino.__version__.split("-")[0]
    if release in WRONG_RELEASES:
        raise UserError(f"OpenVINO {release} computes binary convolutions wrongly: {INSTALL}")
    _check(openvino, release)
    return openvino


@functools.cache
def _check(engine: ModuleType, release: str) -> None:
    for shape in TRIED:
        try:
            computed, exact, kernels = self_test_layer(engine, shape)
        except RuntimeError as error:
            raise UserError(NO_KERNELS.format(release)) from error
        if any(kernel.startswith("ref") for kernel in kernels):
            raise UserError(NO_KERNELS.format(release))
        if wrong := int((computed != exact).sum()):
            raise UserError(
                f"OpenVINO {release} computes binary convolutions wrongly on this CPU"
                f" ({wrong} of {exact.size} values): {INSTALL}"
            )


def write_openvino(
    model: nn.Module, path: Path, image_size: int, batch: int | None, val_resize: int
) -> None:
    """Write `model` as graph and constants: images (N, 3, S, S) -> logits.

    Args:
        batch: N; None leaves it dynamic, to be fixed before the engine compiles the network.
        val_resize: shorter side of validation images before the central crop, kept as metadata.

    Raises:
        UserError: real weights or activations, no engine that can be trusted, or no room.
    """
    engine = load_engine()
    network = build_graph(engine, model, image_size, batch)
    network.set_rt_info(str(val_resize), [NOTES, VAL_RESIZE])
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / f"network{SUFFIX}"
        engine.serialize(network, graph)
        constants = constants_path(graph).read_bytes()
        network.set_rt_info(hashlib.sha256(constants).hexdigest(), [NOTES, DIGEST])
        engine.serialize(network, graph)
        described = graph.read_bytes()
    atomic_write(constants_path(path), lambda file: file.write(constants))
    atomic_write(path, lambda file: file.write(described))


class OpenVinoNetwork(ExportedNetwork):
    """(N, 3, S, S) images -> (N, classes) logits, computed by OpenVINO.

    Args:
        threads: that compute; None leaves their number to the engine.

    Raises:
        UserError: no network of `write_openvino`, a damaged one, or no engine to be trusted.
    """

    def __init__(self, path: Path, threads: int | None = None):
        super().__init__()
        self.path = path
        engine = load_engine()
        if not (path.is_file() and constants_path(path).is_file()):
            raise UserError(f"{path} or {constants_path(path).name} beside it does not exist")
        self.settings = PRECISION | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self.core = engine.Core()
        try:
            self.network = self.core.read_model(path)
            digest = self.network.get_rt_info([NOTES, DIGEST]).value
            self.val_resize = int(self.network.get_rt_info([NOTES, VAL_RESIZE]).value)
            batch, _, size, _ = self.network.input().get_partial_shape()
            self.image_size = size.get_length()
            self.batch = batch.get_length() if batch.is_static else None
        except Exception as error:  # the engine raises whatever the damaged bytes happen to mean
            raise UserError(
                f"{path} is not a binary network for OpenVINO, or a damaged one"
                f" ({type(error).__name__}): convert it again"
            ) from error
        if hashlib.sha256(constants_path(path).read_bytes()).hexdigest() != digest:
            raise UserError(
                f"{constants_path(path)} is damaged, or not of {path.name}: convert it again"
            )
        self.compiled = {}

    def run(self, pixels: np.ndarray) -> np.ndarray:
        return self.compiled_for(len(pixels))(pixels)[0]

    def compiled_for(self, batch: int):
        """The network for so many images; the engine has binary convolutions for no other kind."""
        if batch not in self.compiled:
            if self.batch is None:
                self.network.reshape([batch, 3, self.image_size, self.image_size])
            self.compiled[batch] = self.core.compile_model(self.network, "CPU", self.settings)
        return self.compiled[batch]
