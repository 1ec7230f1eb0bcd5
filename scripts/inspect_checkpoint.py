"""Print what a checkpoint holds: network, layout, epoch, accuracy, digest, every binary layer.

    python scripts/inspect_checkpoint.py FILE [--json]

Per layer: kernel shape; share of +1; range of the scales mean|w|; whether the weights are exactly
-1 and +1; and the quantiles of |w| that tell how close latent weights are to flipping.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.checkpoints import load_network
from models.layers import binary_convolutions
from utils.binarize import BinaryConv2d, channel_scale, is_binary
from utils.run.command_line import Parser, command, markdown_table

QUANTILES = (0.05, 0.5, 0.95)
# Magnitudes, since a |w| would end a column of the Markdown table.
HEADER = ("layer", "shape", "+1 %", "scales", "exact +-1", "magnitudes at 5, 50, 95 %")


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of any layout, or .safetensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    # Where the file does not tell, real weights are shown as if they were latent ones.
    loaded = load_network(arguments.file, defaults={"binary_weights": True})
    layers = [describe(name, conv) for name, conv in binary_convolutions(loaded.model).items()]
    if arguments.json:
        facts = {
            "file": str(loaded.checkpoint.path),
            "network": loaded.name,
            "options": dict(loaded.options),
            "num_classes": loaded.num_classes,
            "layout": loaded.checkpoint.layout,
            "epoch": loaded.checkpoint.epoch,
            "top1": loaded.checkpoint.top1,
            "sha256_16": loaded.checkpoint.digest,
            "layers": layers,
        }
        print(json.dumps(facts))
        return
    print(loaded)
    if layers:
        print(markdown_table([HEADER, *map(table_row, layers)]))
    else:
        print("its weights are real: no layer is binary")


@torch.no_grad()
def describe(name: str, conv: BinaryConv2d) -> dict:
    weight = conv.weight.double()
    scales = channel_scale(weight)
    # The k-th smallest value, since torch.quantile refuses kernels of over 16 million weights.
    magnitudes = weight.abs().flatten().sort().values
    indices = [round(q * (len(magnitudes) - 1)) for q in QUANTILES]
    return {
        "name": name,
        "shape": list(weight.shape),
        "positive_share": (weight >= 0).double().mean().item(),
        "scale_range": [scales.min().item(), scales.max().item()],
        "exact": is_binary(weight),
        "magnitude_quantiles": magnitudes[indices].tolist(),
    }


def table_row(layer: dict) -> list[str]:
    return [
        layer["name"],
        "x".join(map(str, layer["shape"])),
        f"{100 * layer['positive_share']:.2f}",
        " to ".join(f"{scale:.3g}" for scale in layer["scale_range"]),
        "yes" if layer["exact"] else "no",
        ", ".join(f"{magnitude:.3g}" for magnitude in layer["magnitude_quantiles"]),
    ]


if __name__ == "__main__":
    main()
