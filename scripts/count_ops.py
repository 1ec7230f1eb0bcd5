"""Parameters, operations and bytes of a network, by hooks on a forward pass.

    python scripts/count_ops.py reactnet_a [--image_size 224] [--format text|csv|json]

FLOPs are multiply-accumulates of real convolutions and linear layers, BOPs those with both operands
binary, OPs = FLOPs + BOPs / 64, for one image.  Packed bytes take 1 bit per binary weight and
float32 for the other parameters; BN statistics are in neither size.
"""

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build_model
from utils.run.command_line import Parser, boolean, command
from scripts.count_ops import LayerCount, count_layers, total

COLUMNS = ("parameters", "binary_weights", "flops", "bops", "ops", "float_bytes", "packed_bytes")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("name", help="network of models/")
    parser.add_argument("--image_size", type=int, default=224, help="pixels, height and width")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    parser.add_argument(
        "--include_elementwise",
        action="store_true",
        help="add one FLOP per value for BN and PReLU, and per value read for pooling",
    )
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--width", type=float, default=1.0)
    for flag in ("small_images", "binary_activations", "binary_weights"):
        parser.add_argument(f"--{flag}", type=boolean, default=flag != "small_images")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    model = build_model(
        arguments.name,
        num_classes=arguments.num_classes,
        width=arguments.width,
        small_images=arguments.small_images,
        binary_activations=arguments.binary_activations,
        binary_weights=arguments.binary_weights,
    )
    counts = count_layers(model, arguments.image_size, arguments.include_elementwise)
    rows = [row(count) for count in (*counts, total(counts))]
    if arguments.format == "json":
        print(json.dumps(rows, indent=1))
    elif arguments.format == "csv":
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(f"{'layer':32}" + "".join(f"{name:>16}" for name in COLUMNS))
        for values in rows:
            cells = "".join(f"{values[name]:>16,}" for name in COLUMNS)
            print(f"{values['name']:32}{cells}")


def row(count: LayerCount) -> dict:
    ops = int(count.ops) if count.ops == int(count.ops) else count.ops
    sizes = {"float_bytes": count.float_bytes, "packed_bytes": count.packed_bytes}
    return asdict(count) | {"ops": ops} | sizes


if __name__ == "__main__":
    main()
