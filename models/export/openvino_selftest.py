"""Binary convolutions as OpenVINO computes them on this CPU, against integer arithmetic."""

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.export.openvino_graph import Graph

PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # also on a CPU that has bfloat16
BINARY = "BinaryConvolution"


class LayerShape(NamedTuple):
    """A layer to try and its input; `fused` adds what follows the convolution in a network."""

    inputs: int
    outputs: int
    kernel_size: int
    stride: int
    height: int
    width: int
    batch: int = 1
    fused: bool = False


# Channels that fill no vector, odd sizes, both kernels of the networks.
TRIED = (
    LayerShape(40, 24, kernel_size=3, stride=2, height=7, width=5),
    LayerShape(64, 72, kernel_size=1, stride=1, height=3, width=5, batch=2, fused=True),
)


def self_test_layer(
    engine: ModuleType, shape: LayerShape, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """What the engine gives, what integers give, and which of the engine's kernels ran.

    The layer is Sign(scale * x + shift), where many x lie exactly at a threshold, and a binary
    convolution, padded as in the networks; fused, then scale, shift, shortcut and PReLU.  All
    numbers are small multiples of 1/8, so that no float32 is rounded.

    Raises:
        RuntimeError: the engine refuses the layer.
    """
    rng = np.random.default_rng(seed)
    padding = shape.kernel_size // 2
    conv = nn.Conv2d(shape.inputs, shape.outputs, shape.kernel_size, shape.stride, padding)
    conv.weight.data = torch.from_numpy(rng.choice([-1.0, 1.0], conv.weight.shape))
    x = rng.integers(-8, 9, (shape.batch, shape.inputs, shape.height, shape.width)) / 8
    scale = rng.choice([1.0, -1.0, 0.5, 0.0], shape.inputs, p=[0.5, 0.3, 0.15, 0.05])
    shift = rng.integers(-4, 5, shape.inputs) / 8

    signs = np.where(_channels(scale) * x + _channels(shift) >= 0, 1.0, -1.0)
    sums = F.conv2d(torch.from_numpy(signs), conv.weight.data, None, shape.stride, padding)
    exact = sums.numpy()

    graph = Graph(engine, {})
    image = graph.images(*x.shape)
    y = graph.binary_convolution(graph.sign(image.mapped(scale, shift)), conv)
    inputs = [(image.node, x)]
    if shape.fused:
        scale, shift = rng.integers(-3, 4, (2, shape.outputs))
        residual = rng.integers(-9, 10, exact.shape)
        prelu = nn.PReLU(shape.outputs)
        prelu.weight.data = torch.from_numpy(rng.integers(0, 5, shape.outputs) / 4)
        exact = _channels(scale) * exact + _channels(shift) + residual
        exact = np.where(exact < 0, _channels(prelu.weight.data.numpy()) * exact, exact)
        shortcut = graph.images(*residual.shape)
        y = graph.prelu(graph.add(y.mapped(scale, shift), shortcut), prelu)
        inputs.append((shortcut.node, residual))

    network = engine.Model([graph.plain(y).node], [node for node, _ in inputs], "layer")
    compiled = engine.Core().compile_model(network, "CPU", PRECISION)
    computed = compiled([values.astype(np.float32) for _, values in inputs])[0]
    return computed, exact, kernels(compiled)


def kernels(compiled) -> set[str]:
    """Which kernels a compiled network runs its binary convolutions with."""
    nodes = compiled.get_runtime_model().get_ops()
    facts = [node.get_rt_info() for node in nodes]
    return {fact["primitiveType"].value for fact in facts if fact["layerType"].value == BINARY}


def _channels(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]
