"""Print what a checkpoint holds: network, layout, epoch, accuracy, digest, every binary layer.

    python scripts/inspect_checkpoint.py FILE

Per layer: kernel shape; share of +1; range of the scales mean|w|; whether the weights are exactly
-1 and +1; and the quantiles of |w| that tell how close latent weights are to flipping.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.checkpoints import load_network
from utils.binarize import binary_convolutions, channel_scale, is_binary
from utils.run.command_line import Parser, command, markdown_table

QUANTILES = (0.05, 0.5, 0.95)
# Magnitudes, since a |w| would end a column of the Markdown table.
HEADER = ("layer", "shape", "+1 %", "scales", "exact +-1", "magnitudes at 5, 50, 95 %")


@command
@torch.no_grad()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of any layout, or .safetensors")
    arguments = parser.parse_args()
    loaded = load_network(arguments.file, defaults={"binary_weights": True})
    print(loaded)
    if loaded.config is None and not loaded.has_exact_weights:
        print("If it is of step 1, which the layout does not tell, these are its real weights.")
    layers = binary_convolutions(loaded.model).items()
    if layers:
        rows = [table_row(name, conv.weight.double()) for name, conv in layers]
        print(markdown_table([HEADER, *rows]))
    else:
        print("its weights are real: no layer is binary")


def table_row(name: str, weight: Tensor) -> tuple[str, ...]:
    scales = channel_scale(weight)
    # The k-th smallest value, since torch.quantile refuses kernels of over 16 million weights.
    magnitudes = weight.abs().flatten().sort().values
    quantiles = [magnitudes[round(q * (len(magnitudes) - 1))] for q in QUANTILES]
    return (
        name,
        "x".join(map(str, weight.shape)),
        f"{100 * (weight >= 0).double().mean():.2f}",
        f"{scales.min():.3g} to {scales.max():.3g}",
        "yes" if is_binary(weight) else "no",
        ", ".join(f"{magnitude:.3g}" for magnitude in quantiles),
    )


if __name__ == "__main__":
    main()
