"""Count the parameters, operations and bytes of a network, by hooks on a forward pass.

    python scripts/count_ops.py reactnet_a [--image_size 224] [--format text|csv|json]

FLOPs are multiply-accumulates of real convolutions and linear layers, BOPs those with both operands
binary, OPs = FLOPs + BOPs / 64 (Bi-Real Net and its successors), for one image.  Packed bytes take
1 bit per binary weight and float32 for the other parameters; BN statistics are in neither size.
"""

import copy
import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models import build_model
from utils.binarize import BinaryConv2d, is_binary
from utils.run.command_line import Parser, command, markdown_table, positive

SUMMED = ("parameters", "binary_weights", "flops", "bops")
COLUMNS = ("name", *SUMMED, "ops", "float_bytes", "packed_bytes")


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
        """OPs; an int where it is whole."""
        ops = self.flops + self.bops / 64
        return int(ops) if ops.is_integer() else ops

    @property
    def float_bytes(self) -> int:
        return 4 * self.parameters

    @property
    def packed_bytes(self) -> int:
        return math.ceil(self.binary_weights / 8) + 4 * (self.parameters - self.binary_weights)


def count_layers(model: nn.Module, image_size: int) -> list[LayerCount]:
    """One `LayerCount` for each layer with parameters, in the order of definition."""
    operations: dict[nn.Module, tuple[int, int]] = {}  # FLOPs, BOPs

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs = output[0].numel() * module.weight[0].numel()
        both_binary = isinstance(module, BinaryConv2d) and is_binary(inputs[0])
        operations[module] = (0, macs) if both_binary else (macs, 0)

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, image_size, image_size))

    counts = []
    for name, module in model.named_modules():
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if parameters:
            binary = module.weight.numel() if isinstance(module, BinaryConv2d) else 0
            counts.append(LayerCount(name, parameters, binary, *operations.get(module, (0, 0))))
    return counts


def total(counts: list[LayerCount]) -> LayerCount:
    """The sum over layers."""
    return LayerCount("total", *(sum(getattr(c, name) for c in counts) for name in SUMMED))


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", help="network of models/")
    parser.add_argument("--image_size", type=positive, default=224, help="pixels, height and width")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    arguments = parser.parse_args()
    counts = count_layers(build_model(arguments.name), arguments.image_size)
    rows = [[getattr(count, name) for name in COLUMNS] for count in (*counts, total(counts))]
    if arguments.format == "json":
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=1))
    elif arguments.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([COLUMNS, *rows])
    else:
        cells = [[name, *(f"{n:,}" for n in numbers)] for name, *numbers in rows]
        print(markdown_table([["layer", *COLUMNS[1:]], *cells]))


if __name__ == "__main__":
    main()
