"""Binary convolutions as OpenVINO computes them on this CPU, against integer arithmetic."""

from types import ModuleType

import numpy as np
import torch
from torch import nn

from models.export.openvino_graph import Graph

PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # also on a CPU that has bfloat16
# Channels that fill no vector, odd sizes, both kernels of the networks.
SELF_TEST = (
    ((40, 24, 3, 2), (1, 7, 5), False),
    ((64, 72, 1, 1), (2, 3, 5), True),
)


def compare_with_integers(
    engine: ModuleType, layer: tuple[int, ...], images: tuple[int, ...], fused: bool, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """What the engine computes, what integers give, and which of the engine's kernels ran.

    The layer is Sign(scale * x + shift), where many x lie exactly at a threshold, and a binary
    convolution, padded as in the networks; `fused` adds what follows there: scale, shift, shortcut
    and PReLU.  All numbers are small multiples of 1/8, so that no float32 is rounded.

    Args:
        layer: input channels, output channels, kernel size and stride.
        images: batch, height and width.

    Raises:
        RuntimeError: the engine refuses the layer.
    """
    (inputs, outputs, kernel_size, stride), (batch, height, width) = layer, images
    rng = np.random.default_rng(seed)
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
    conv.requires_grad_(False)
    conv.weight.data = torch.from_numpy(rng.choice([-1.0, 1.0], conv.weight.shape))
    x = rng.integers(-8, 9, (batch, inputs, height, width)) / 8
    scale = rng.choice([1.0, -1.0, 0.5, 0.0], (inputs, 1, 1), p=[0.5, 0.3, 0.15, 0.05])
    shift = rng.integers(-4, 5, (inputs, 1, 1)) / 8
    exact = conv(torch.from_numpy(np.where(scale * x + shift >= 0, 1.0, -1.0))).numpy()

    graph = Graph(engine, {})
    image = graph.input(*x.shape)
    y = graph.binary_convolution(image.affine(scale.ravel(), shift.ravel()), conv)
    nodes, arrays = [image.node], [x]
    if fused:
        scale, shift = rng.integers(-3, 4, (2, outputs, 1, 1))
        residual = rng.integers(-9, 10, exact.shape)
        prelu = nn.PReLU(outputs).requires_grad_(False)
        prelu.weight.data = torch.from_numpy(rng.integers(0, 5, outputs) / 4)
        exact = prelu(torch.from_numpy(scale * exact + shift + residual)).numpy()

        shortcut = graph.input(*residual.shape)
        y = graph.prelu(graph.add(y.affine(scale.ravel(), shift.ravel()), shortcut), prelu)
        nodes.append(shortcut.node)
        arrays.append(residual)

    network = engine.Model([graph.apply_affine(y).node], nodes, "layer")
    compiled = engine.Core().compile_model(network, "CPU", PRECISION)
    computed = compiled([array.astype(np.float32) for array in arrays])[0]
    return computed, exact, binary_kernels(compiled)


def binary_kernels(compiled) -> set[str]:
    """Which of the engine's kernels a compiled network runs its binary convolutions with."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return {n["primitiveType"].value for n in nodes if n["layerType"].value == "BinaryConvolution"}
