"""OpenVINO: write a network in its bits, and run a written one as if it were a module.

A written network is `NAME.xml`, the graph, and beside it `NAME.bin`, its constants, whose SHA-256
the graph holds.  Before writing and before reading, the engine's binary convolutions are compared
with integers: some of its releases compute them wrongly, without an error.
"""

import functools
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import nn

from models.export.exported import VAL_RESIZE, ExportedNetwork, import_engine
from models.export.openvino_graph import build_graph
from models.export.openvino_selftest import PRECISION, SELF_TEST, compare_with_integers
from utils.checkpoint.files import atomic_write, sha256
from utils.run.errors import UserError

SUFFIX = ".xml"
METADATA, DIGEST = "adambnn", "constants_sha256"
WRONG_RELEASES = ("2026.3.0", "2026.3.1")
REQUIREMENTS = "requirements-openvino.txt"


def constants_path(path: Path) -> Path:
    """The file beside a graph that holds its constants."""
    return path.with_suffix(".bin")


@functools.cache
def load_engine() -> ModuleType:
    """The openvino package, whose binary convolutions are right on this CPU.

    Raises:
        UserError: it is not installed, is a release known to be wrong, computes a layer of the
            self-test wrongly, or has no kernels of its own for it.
    """
    engine = import_engine(REQUIREMENTS, "openvino", "openvino.opset13")
    release = engine.__version__.split("-")[0]
    install = f"python -m pip install -r {REQUIREMENTS}"
    if release in WRONG_RELEASES:
        raise UserError(f"OpenVINO {release} computes binary convolutions wrongly: {install}")
    for layer in SELF_TEST:
        try:
            computed, exact, kernels = compare_with_integers(engine, *layer)
            if any(kernel.startswith("ref") for kernel in kernels):
                raise RuntimeError("it would compute with its reference kernels")
        except RuntimeError as error:
            raise UserError(
                f"OpenVINO {release} has no binary convolutions for this CPU:"
                " they need x86-64 with SSE4.1"
            ) from error
        if wrong := int((computed != exact).sum()):
            raise UserError(
                f"OpenVINO {release} computes binary convolutions wrongly on this CPU"
                f" ({wrong} of {exact.size} values): {install}"
            )
    return engine


def write_openvino(
    model: nn.Module, path: Path, image_size: int, batch: int | None, val_resize: int
) -> None:
    """Write graph and constants: images (N, 3, S, S) -> logits.  Arguments as of `write_onnx`.

    Raises:
        UserError: real weights or activations, no engine that can be trusted, or no room.
    """
    engine = load_engine()
    network = build_graph(engine, model, image_size, batch)
    network.set_rt_info(str(val_resize), [METADATA, VAL_RESIZE])
    with tempfile.TemporaryDirectory() as folder:
        graph_file = Path(folder) / f"network{SUFFIX}"
        engine.serialize(network, graph_file)
        constants = constants_path(graph_file).read_bytes()
        network.set_rt_info(sha256(constants_path(graph_file)), [METADATA, DIGEST])
        engine.serialize(network, graph_file)
        graph = graph_file.read_bytes()
    atomic_write(constants_path(path), lambda file: file.write(constants))
    atomic_write(path, lambda file: file.write(graph))


class OpenVinoNetwork(ExportedNetwork):
    """A network that OpenVINO computes."""

    engine_name = "OpenVINO"

    def open(self, path: Path) -> None:
        engine, constants = load_engine(), constants_path(path)
        if not (path.is_file() and constants.is_file()):
            raise UserError(f"{path} or {constants.name} beside it does not exist")
        self.core = engine.Core()
        self.network = self.core.read_model(path)
        if self.network.get_rt_info([METADATA, DIGEST]).value != sha256(constants):
            raise ValueError("its constants are damaged, or another network's")
        self.val_resize = int(self.network.get_rt_info([METADATA, VAL_RESIZE]).value)
        batch, _, size, _ = self.network.input().get_partial_shape()
        self.image_size = size.get_length()
        self.batch = batch.get_length() if batch.is_static else None
        self.compiled = {}  # by batch: the engine has binary convolutions for no dynamic one

    def run(self, pixels: np.ndarray) -> np.ndarray:
        batch = len(pixels)
        if batch not in self.compiled:
            if self.batch is None:
                self.network.reshape([batch, 3, self.image_size, self.image_size])
            self.compiled[batch] = self.core.compile_model(self.network, "CPU", PRECISION)
        return self.compiled[batch](pixels)[0]
