"""What a checkpoint holds: network, layout, epoch, accuracy, digest, and every binary layer.

    python scripts/inspect_checkpoint.py FILE [--json]

Per layer: kernel shape; share of +1; range of the scales mean|w|; whether the weights are exactly
-1 and +1; and the quantiles of |w| that tell how close latent weights are to flipping.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.export.fold import binary_convolutions
from models.checkpoints import LoadedNetwork, load_network
from utils.binarize import BinaryConv2d, channel_scale, is_binary
from utils.run.command_line import Parser, command

QUANTILES = (0.05, 0.5, 0.95)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of any layout, or .safetensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    # Without a word from the file, real weights are looked at as if they were latent ones.
    loaded = load_network(arguments.file, defaults={"binary_weights": True})
    layers = [describe(name, conv) for name, conv in binary_convolutions(loaded.model).items()]
    if arguments.json:
        print(json.dumps(facts(loaded) | {"layers": layers}))
        return
    print(loaded)
    if not layers:
        print("its weights are real: no layer is binary")
        return
    print(f"{'layer':32} {'shape':>18} {'+1 %':>6} {'scales':>19} {'+-1':>4}  |w| at 5, 50, 95 %")
    for layer in layers:
        low, high = layer["scale_range"]
        print(
            f"{layer['name']:32} {'x'.join(map(str, layer['shape'])):>18}"
            f" {100 * layer['positive_share']:6.2f} {low:9.3g}-{high:9.3g}"
            f" {'yes' if layer['exact'] else 'no':>4}"
            f"  {', '.join(f'{value:.3g}' for value in layer['magnitude_quantiles'])}"
        )


def facts(loaded: LoadedNetwork) -> dict:
    checkpoint = loaded.checkpoint
    return {
        "file": str(checkpoint.path),
        "network": loaded.name,
        "options": dict(loaded.options),
        "num_classes": loaded.num_classes,
        "layout": checkpoint.layout,
        "epoch": checkpoint.epoch,
        "top1": checkpoint.top1,
        "sha256_16": checkpoint.digest,
    }


@torch.no_grad()
def describe(name: str, conv: BinaryConv2d) -> dict:
    weight = conv.weight.double()
    scales = channel_scale(weight)
    # The k-th smallest value, since torch.quantile refuses kernels of over 16 million weights.
    magnitudes = weight.abs().flatten().sort().values
    picked = [round(q * (len(magnitudes) - 1)) for q in QUANTILES]
    return {
        "name": name,
        "shape": list(weight.shape),
        "positive_share": (weight >= 0).double().mean().item(),
        "scale_range": [scales.min().item(), scales.max().item()],
        "exact": is_binary(weight),
        "magnitude_quantiles": magnitudes[picked].tolist(),
    }


if __name__ == "__main__":
    main()
