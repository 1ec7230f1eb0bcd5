"""Parameters, operations and bytes of a network, measured by hooks on a forward pass.

FLOPs are multiply-accumulates of convolutions and linear layers; those whose inputs and weights
are both binary count as BOPs instead.  OPs = FLOPs + BOPs / 64 (Bi-Real Net and its successors).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.binarize import BinaryConv2d, is_binary

BOPS_PER_OP = 64


@dataclass(frozen=True)
class LayerCount:
    """Counts of one layer, or of a whole network; operations are for one image."""

    name: str
    parameters: int
    binary_weights: int
    flops: int
    bops: int

    @property
    def ops(self) -> float:
        return self.flops + self.bops / BOPS_PER_OP

    @property
    def float_bytes(self) -> int:
        """Every parameter in float32; BN statistics apart."""
        return 4 * self.parameters

    @property
    def packed_bytes(self) -> int:
        """Binary weights at 1 bit, the other parameters in float32; BN statistics apart."""
        return math.ceil(self.binary_weights / 8) + 4 * (self.parameters - self.binary_weights)


ELEMENTWISE = (nn.BatchNorm2d, nn.PReLU)
POOLING = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


def count_layers(
    model: nn.Module, image_size: int, include_elementwise: bool = False
) -> list[LayerCount]:
    """One `LayerCount` for each layer with parameters or operations, in the order of definition.

    Args:
        image_size: pixels, height and width.
        include_elementwise: add one FLOP per value for BN and PReLU, and one per value that a
            pooling window reads.
    """
    operations: dict[nn.Module, tuple[int, int]] = {}

    def measure(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, POOLING):
            operations[module] = (_values_pooled(module, inputs[0], output), 0)
            return
        if isinstance(module, ELEMENTWISE):
            operations[module] = (output[0].numel(), 0)
            return
        macs = module.weight[0].numel() * output[0].numel()
        counts_bops = isinstance(module, BinaryConv2d) and is_binary(inputs[0])
        operations[module] = (0, macs) if counts_bops else (macs, 0)

    counted = (nn.Conv2d, nn.Linear, *((ELEMENTWISE + POOLING) if include_elementwise else ()))
    hooks = [m.register_forward_hook(measure) for m in model.modules() if isinstance(m, counted)]
    was_training = model.training
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    counts = []
    for name, module in model.named_modules():
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if parameters or module in operations:
            binary = module.weight.numel() if isinstance(module, BinaryConv2d) else 0
            counts.append(LayerCount(name, parameters, binary, *operations.get(module, (0, 0))))
    return counts


def _values_pooled(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x[0].numel()
    return output[0].numel() * module.kernel_size**2


def total(counts: list[LayerCount]) -> LayerCount:
    """The sum over layers."""
    return LayerCount(
        "total",
        sum(count.parameters for count in counts),
        sum(count.binary_weights for count in counts),
        sum(count.flops for count in counts),
        sum(count.bops for count in counts),
    )
