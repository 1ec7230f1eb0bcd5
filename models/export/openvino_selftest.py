"""Binary convolutions as OpenVINO computes them on this CPU, against integer arithmetic."""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from models.export.openvino_graph import trace_graph
from utils.binarize import BinaryConv2d, Sign

PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # also on a CPU that has bfloat16


class SelfTestLayer(nn.Module):
    """BN -> Sign -> binary convolution, then BN, shortcut and PReLU if it keeps the shape.

    All its numbers are small multiples of 1/8, so that no float32 is rounded, and many inputs of
    Sign are exactly 0.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, seed: int = 0):
        super().__init__()
        rng = np.random.default_rng(seed)
        scale = rng.choice([1.0, -1.0, 0.5, 0.0], inputs, p=[0.5, 0.3, 0.15, 0.05])
        self.norm = norm(scale, rng.integers(-4, 5, inputs) / 8)
        self.sign = Sign()
        self.conv = BinaryConv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.conv.weight.data = torch.from_numpy(rng.choice([-1.0, 1.0], self.conv.weight.shape))
        self.keeps_shape = inputs == outputs and stride == 1
        if self.keeps_shape:
            self.scale = norm(*rng.integers(-3, 4, (2, outputs)).astype(float))
            self.prelu = nn.PReLU(outputs)
            self.prelu.weight.data = torch.from_numpy(rng.integers(0, 5, outputs) / 4)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.sign(self.norm(x)))
        return self.prelu(self.scale(y) + x) if self.keeps_shape else y


def norm(scale: np.ndarray, shift: np.ndarray) -> nn.BatchNorm2d:
    """scale * x + shift, exactly."""
    layer = nn.BatchNorm2d(len(scale), eps=0.5)
    layer.running_var.fill_(0.5)
    layer.weight.data, layer.bias.data = torch.from_numpy(scale), torch.from_numpy(shift)
    return layer


# Channels that fill no vector, odd sizes, both kernels of the networks.
SELF_TEST = (
    (SelfTestLayer(40, 24, 3, 2), (1, 40, 7, 5)),
    (SelfTestLayer(72, 72, 1, 1), (2, 72, 3, 5)),
)


def compare_with_integers(
    engine: ModuleType, layer: SelfTestLayer, shape: tuple[int, ...], seed: int = 0
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """What the engine computes, what integers give, and which of the engine's kernels ran.

    Raises:
        RuntimeError: the engine refuses the layer.
    """
    x = np.random.default_rng(seed).integers(-8, 9, shape) / 8
    network = trace_graph(engine, layer, shape)
    compiled = engine.Core().compile_model(network, "CPU", PRECISION)
    computed = compiled([x.astype(np.float32)])[0]
    return computed, layer(torch.from_numpy(x)).numpy(), binary_kernels(compiled)


def binary_kernels(compiled) -> set[str]:
    """Which of the engine's kernels a compiled network runs its binary convolutions with."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return {n["primitiveType"].value for n in nodes if n["layerType"].value == "BinaryConvolution"}
