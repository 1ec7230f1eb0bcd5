"""Draw how bits replace multiplications: python scripts/draw_bits.py --picture docs/inference.png

Eight activations against their thresholds, the bits of one kernel, XNOR, popcount.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from utils.command_line import Parser, command
from utils.files import write_whole

ACTIVATIONS = np.array([0.7, -0.2, 0.1, 1.3, -0.9, 0.4, 0.0, -1.1])
THRESHOLDS = np.array([0.2, -0.5, 0.3, 0.4, -0.1, 0.4, 0.5, -1.6])
KERNEL = np.array([1, -1, 1, 1, -1, 1, 1, 1])


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--picture", type=Path, required=True)
    return parser.parse_args()


@command
def main() -> None:
    picture = parse().picture
    signs = np.where(ACTIVATIONS >= THRESHOLDS, 1, -1)
    agree = signs == KERNEL
    assert signs @ KERNEL == 2 * agree.sum() - len(KERNEL)
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    rows = [
        ("activation x", [f"{x:g}" for x in ACTIVATIONS], None),
        ("threshold -b", [f"{t:g}" for t in THRESHOLDS], None),
        ("bit of Sign(x + b)", (signs > 0).astype(int), signs > 0),
        ("bit of Sign(w)", (KERNEL > 0).astype(int), KERNEL > 0),
        ("XNOR: equal?", agree.astype(int), agree),
    ]
    for place, (name, texts, marked) in enumerate(rows):
        draw_row(axes, -place, name, texts, marked)
    count, n = agree.sum(), len(KERNEL)
    axes.text(
        n / 2,
        -len(rows) - 0.1,
        f"popcount {count};   sum of products = 2 * {count} - {n} = {2 * count - n}",
        ha="center",
        fontsize=12,
    )
    axes.set_xlim(-3.2, n)
    axes.set_ylim(-len(rows) - 0.6, 1)
    axes.set_axis_off()
    write_whole(picture, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_row(axes: Axes, y: float, name: str, texts, marked: np.ndarray | None) -> None:
    axes.text(-0.2, y + 0.4, name, ha="right", va="center", fontsize=11)
    for x, text in enumerate(texts):
        colour = "white" if marked is None else ("tab:blue" if marked[x] else "lightgrey")
        axes.add_patch(plt.Rectangle((x, y), 0.95, 0.8, facecolor=colour, edgecolor="grey"))
        ink = "white" if marked is not None and marked[x] else "black"
        axes.text(x + 0.475, y + 0.4, str(text), ha="center", va="center", color=ink, fontsize=11)


if __name__ == "__main__":
    main()
