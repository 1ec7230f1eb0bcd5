"""Compare runs: print a table of accuracy, size and operations, and draw their curves.

python scripts/summarize.py --picture curves.png NAME=RUN_FOLDER ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.checkpoints import load_network
from scripts.count_ops import count_layers, total
from utils.checkpoint.checkpoint import BEST
from utils.checkpoint.files import atomic_write
from utils.run.command_line import Parser, command, markdown_table
from utils.run.errors import UserError
from utils.run.logging import read_records

HEADER = ("", "top-1 %", "best epoch", "parameters", "binary", "float32 KB", "packed KB", "MOPs")


def table_row(name: str, folder: Path) -> tuple[str, ...]:
    best = max(read_records(folder), key=lambda record: record["val_top1"])
    loaded = load_network(folder / BEST)
    count = total(count_layers(loaded.model, loaded.image_size))
    return (
        name,
        f"{best['val_top1']:.2f}",
        str(best["epoch"]),
        f"{count.parameters:,}",
        f"{count.binary_weights:,}",
        f"{count.float_bytes / 1e3:,.0f}",
        f"{count.packed_bytes / 1e3:,.0f}",
        f"{count.ops / 1e6:.2f}",
    )


def draw_curves(runs: dict[str, Path], picture: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle("line: validation on labels; dashed: training, the loss as minimized")
    losses, accuracies = figure.subplots(1, 2)
    losses.set(xlabel="epoch", ylabel="loss")
    accuracies.set(xlabel="epoch", ylabel="top-1 %")
    for index, (name, folder) in enumerate(runs.items()):
        records = read_records(folder)
        epochs = [record["epoch"] for record in records]
        for axes, key in ((losses, "loss"), (accuracies, "top1")):
            val = [record[f"val_{key}"] for record in records]
            train = [record[f"train_{key}"] for record in records]
            axes.plot(epochs, val, "-", color=f"C{index}", label=name)
            axes.plot(epochs, train, "--", color=f"C{index}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracies.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(picture, lambda file: figure.savefig(file, format="png", dpi=120))


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--picture", type=Path, required=True, help="PNG file for the curves")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_FOLDER")
    arguments = parser.parse_args()
    runs = {}
    for run in arguments.runs:
        name, separator, folder = run.partition("=")
        if not separator:
            raise UserError(f"give each run as NAME=RUN_FOLDER, not {run!r}")
        runs[name] = Path(folder)
    print(markdown_table([HEADER, *(table_row(name, folder) for name, folder in runs.items())]))
    draw_curves(runs, arguments.picture)
    print(f"curves: {arguments.picture}")


if __name__ == "__main__":
    main()
