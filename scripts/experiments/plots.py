"""Draw a table or figure of the paper from the CSV that run_experiment.py gathered.

    python scripts/plot_experiment.py fig8 scripts/out/small/fig8.csv --picture fig8.png

Reads nothing but the CSV; prints what the picture says as a Markdown table.
"""

import csv
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.run.command_line import Parser, command
from utils.run.errors import UserError
from utils.checkpoint.files import atomic_write
from utils.run.command_line import print_table

COLOURS = {"SGD": "tab:orange", "Adam": "tab:blue"}
PUBLISHED = {"marker": "*", "s": 120, "edgecolors": "black", "linewidths": 0.6, "zorder": 3}


class Table:
    """Rows of a CSV; a column that a drawing needs and the file lacks is said by name."""

    def __init__(self, path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]):
        self.path = path
        self.rows = rows
        self.columns = columns

    @classmethod
    def read(cls, path: Path) -> "Table":
        try:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if not rows:
            raise UserError(f"{path} has no rows: run scripts/run_experiment.py first")
        return cls(path, rows, reader.fieldnames)

    def where(self, **values: str) -> "Table":
        """The rows that have these values."""
        for column in values:
            self._need(column)
        rows = [row for row in self.rows if all(row[c] == v for c, v in values.items())]
        return Table(self.path, rows, self.columns)

    def distinct(self, column: str) -> list[str]:
        """Its values, in order of first appearance."""
        self._need(column)
        return list(dict.fromkeys(row[column] for row in self.rows))

    def numbers(self, column: str) -> np.ndarray:
        """Its values; those left empty are left out."""
        self._need(column)
        try:
            return np.array([float(row[column]) for row in self.rows if row[column]])
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path}: column {column} must hold numbers ({error})") from error

    def mean(self, column: str) -> float | None:
        values = self.numbers(column)
        return statistics.fmean(values) if len(values) else None

    def _need(self, column: str) -> None:
        if column not in self.columns:
            raise UserError(
                f"{self.path} has no column {column!r}: gather it again with"
                " scripts/run_experiment.py, for the same table or figure"
            )


def text(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def with_spread(values: np.ndarray, form: str = ".2f") -> str:
    """The mean over seeds and, where there are several, the range."""
    if not len(values):
        return ""
    mean = format(values.mean(), form)
    return mean if len(values) == 1 else f"{mean} ({values.min():{form}} to {values.max():{form}})"


def results_table(table: Table, columns: dict[str, str]) -> None:
    """Print ours and the paper's values of each run, side by side."""
    ours, paper = table.where(source="measured"), table.where(source="published")
    header = ["", "seeds"] + [f"{c} {who}" for c in columns for who in ("here", "published")]
    rows = [header]
    for run in table.distinct("run"):
        row = [run, str(len(ours.where(run=run).rows) or "")]
        for column, form in columns.items():
            row.append(with_spread(ours.where(run=run).numbers(column), form))
            row.append(text(paper.where(run=run).mean(column) if paper.rows else None, form))
        rows.append(row)
    print_table(rows)


def bars(axes: Axes, table: Table, column: str, title: str) -> None:
    """The mean of each run as a bar, single seeds as dots."""
    runs = [run for run in table.distinct("run") if len(table.where(run=run).numbers(column))]
    for place, run in enumerate(reversed(runs)):
        values = table.where(run=run).numbers(column)
        axes.barh(place, values.mean(), color="tab:blue", alpha=0.6)
        axes.plot(values, [place] * len(values), "k.", markersize=4)
        axes.text(values.max(), place, f" {values.mean():.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(runs)), list(reversed(runs)), fontsize=8)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("top-1 %")


def draw_table1(table: Table) -> Figure:
    results_table(table, {"ff_ratio": ".2e", "c2i_ratio": ".4f", "top1": ".2f"})
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    titles = {"measured": "here", "published": "published (ImageNet)"}
    colours = {run: f"C{place}" for place, run in enumerate(table.distinct("run"))}
    for axes, (source, title) in zip(panels, titles.items(), strict=True):
        rows = table.where(source=source)
        for run in rows.distinct("run"):
            if run.startswith("step 1"):
                continue
            found = rows.where(run=run)
            marker = "s" if run.startswith("two-step") else "o"
            label = f"{run}: {found.mean('top1'):.2f} %"
            point = found.mean("ff_ratio"), found.mean("c2i_ratio")
            axes.scatter(*point, s=60, color=colours[run], marker=marker, label=label)
        axes.set(xscale="log", xlabel="FF ratio", ylabel="C2I ratio", title=title)
        axes.margins(0.1)
        axes.legend(title="run (weight decay): top-1", fontsize=8, title_fontsize=8)
    return figure


def draw_accuracies(table: Table) -> Figure:
    results_table(table, {"top1": ".2f", "top5": ".2f"} if "top5" in table.columns else {})
    published = table.where(source="published")
    figure, panels = plt.subplots(
        1, 1 + bool(published.rows), figsize=(11, 4.5), layout="constrained", squeeze=False
    )
    bars(panels[0, 0], table.where(source="measured"), "top1", "here")
    if published.rows:
        bars(panels[0, 1], published, "top1", "published (ImageNet)")
        if len(published.rows) == 1:
            panels[0, 1].set(xlim=(0, None), ylim=(-3, 3))
    return figure


def draw_surfaces(table: Table) -> Figure:
    runs = table.distinct("run")
    seed = table.distinct("seed")[0]
    low = table.numbers("loss").min()
    # Far corners would flatten the rest: the scale ends within the surface that is lower there.
    high = min(np.quantile(table.where(run=run).numbers("loss"), 0.95) for run in runs)
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    summary = [["", "loss at the centre", "at distance 0.5", "at the corners"]]
    for place, run in enumerate(runs):
        rows = table.where(run=run, seed=seed)
        points = np.sort(np.unique(rows.numbers("alpha")))
        loss = np.full((len(points), len(points)), np.nan)
        columns = (np.searchsorted(points, rows.numbers(name)) for name in ("alpha", "beta"))
        loss[tuple(columns)] = rows.numbers("loss")
        colours = {"vmin": low, "vmax": high, "cmap": "viridis"}
        first, second = np.meshgrid(points, points, indexing="ij")
        axes = figure.add_subplot(2, len(runs), place + 1, projection="3d")
        axes.plot_surface(first, second, loss.clip(max=high), rstride=1, cstride=1, **colours)
        ticks = (-1, 0, 1)
        axes.set(title=run, zlim=(low, high), zlabel="loss", xticks=ticks, yticks=ticks)
        axes = figure.add_subplot(2, len(runs), len(runs) + place + 1)
        levels = np.linspace(low, high, 25)
        shades = axes.contourf(first, second, loss, levels, extend="both", **colours)
        axes.set(aspect="equal", xlabel="direction 1", ylabel="direction 2")
        distance = np.abs(np.hypot(first, second) - 0.5)
        corners = loss[[0, 0, -1, -1], [0, -1, 0, -1]]
        near = loss[distance < (points[1] - points[0]) / 2]
        centre = loss[len(points) // 2, len(points) // 2]
        summary.append([run, text(centre), text(near.mean()), text(corners.mean())])
    figure.colorbar(shades, ax=figure.axes, label="cross-entropy", shrink=0.6)
    print_table(summary)
    return figure


def draw_curves(table: Table) -> Figure:
    ours, paper = table.where(source="measured"), table.where(source="published")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    summary = [["", "training", "validation", "validation published"]]
    for run in ours.distinct("run"):
        kind, optimizer = run.split(", ")
        axes = panels[int(kind == "binary")]
        epochs = sorted(set(ours.where(run=run).numbers("epoch")))
        finals = []
        for column, style in (("train_top1", "--"), ("val_top1", "-")):
            means = [ours.where(run=run, epoch=f"{e:.0f}").mean(column) for e in epochs]
            label = f"{optimizer}, {'validation' if style == '-' else 'training'}"
            axes.plot(epochs, means, style, color=COLOURS[optimizer], label=label)
            finals.append(means[-1])
        known = paper.where(run=run).mean("val_top1")
        axes.scatter(epochs[-1], known, color=COLOURS[optimizer], **PUBLISHED)
        axes.set(title=kind, xlabel="epoch", ylabel="top-1 %")
        summary.append([run, *map(text, finals), text(known, ".0f")])
    panels[0].scatter([], [], color="white", **PUBLISHED, label="published end (ImageNet)")
    panels[0].legend(fontsize=8)
    print_table(summary)
    return figure


def draw_activations(table: Table) -> Figure:
    ours, paper = table.where(source="measured"), table.where(source="published")
    runs = ours.distinct("run")
    figure, panels = plt.subplots(
        len(runs), 2, figsize=(10, 6), layout="constrained", sharex=True, sharey=True
    )
    summary = [["", "epoch", "saturation here", "published"]]
    for row, run in zip(panels, runs, strict=True):
        for axes, epoch in zip(row, ("first", "last"), strict=True):
            found = ours.where(run=run, epoch=epoch)
            left, right, share = map(found.numbers, ("left", "right", "share"))
            inside = (left >= -1 - 1e-9) & (right <= 1 + 1e-9)
            colours = np.where(inside, "tab:blue", "tab:red")
            seeds = len(found.distinct("seed"))
            axes.bar(left, share / seeds, right - left, align="edge", color=colours)
            known = paper.where(run=run, epoch=epoch).mean("saturation")
            here = found.mean("saturation")
            axes.set_title(
                f"{run}, {epoch} epoch: {here:.1%} saturated (published {known:.1%})", fontsize=9
            )
            summary.append([run, epoch, f"{here:.2%}", f"{known:.2%}"])
    for axes in panels[-1]:
        axes.set_xlabel("input of the first Sign (red: saturated)")
    print_table(summary)
    return figure


def kernel_drawing(column: str, label: str) -> Callable[[Table], Figure]:
    """A drawing of one value per kernel for both optimizers, with Adam's smallest as a line."""

    def draw(table: Table) -> Figure:
        ours, paper = table.where(source="measured"), table.where(source="published")
        smallest = ours.where(run="Adam").numbers(column).min()
        figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
        summary = [["", f"smallest {label}", "standard deviation", "below Adam's smallest"]]
        for axes, run in zip(panels, ("SGD", "Adam"), strict=True):
            values = ours.where(run=run).numbers(column)
            below = (values < smallest).mean()
            axes.bar(range(len(values)), values, color=COLOURS[run])
            axes.axhline(smallest, color="black", linewidth=0.8, linestyle="--")
            axes.set(title=run, xlabel="kernel", ylabel=label)
            numbers = [f"{values.min():.3g}", f"{values.std():.3e}", f"{below:.1%}"]
            summary.append([run, *numbers])
        for row in paper.rows:
            known = [row.get("smallest_cam"), row.get("sdam"), row.get("share_below")]
            summary.append([f"{row['run']}, published", *(value or "" for value in known)])
        print_table(summary)
        return figure

    return draw


def draw_two_nodes(table: Table) -> Figure:
    ours, paper = table.where(source="measured"), table.where(source="published")
    axis = np.linspace(-3, 3, 121)
    x, y = np.meshgrid(axis, axis)
    surfaces = {
        "forward: Sign(x) + Sign(y)": np.where(x < 0, -1, 1) + np.where(y < 0, -1, 1),
        "backward: clip(x) + clip(y)": x.clip(-1, 1) + y.clip(-1, 1),
    }
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axes, (title, height) in zip(panels, surfaces.items(), strict=True):
        shades = axes.contourf(x, y, height, np.linspace(-2, 2, 17), cmap="Greys", alpha=0.7)
        for run in ours.distinct("run"):
            path = ours.where(run=run)
            axes.plot(path.numbers("x"), path.numbers("y"), color=COLOURS[run], label=run)
            end = paper.where(run=run)
            axes.scatter(end.numbers("x"), end.numbers("y"), color=COLOURS[run], **PUBLISHED)
        axes.scatter([], [], color="white", **PUBLISHED, label="published end")
        axes.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    panels[0].legend(loc="upper right", fontsize=8)
    figure.colorbar(shades, ax=panels, shrink=0.8)
    summary = [["", "ends at x", "y", "published x", "y"]]
    for run in ours.distinct("run"):
        x, y = (ours.where(run=run).numbers(name)[-1] for name in "xy")
        known = (paper.where(run=run).mean(name) for name in "xy")
        summary.append([run, text(x), text(y), *(text(value, ".1f") for value in known)])
    print_table(summary)
    return figure


def draw_latents(table: Table) -> Figure:
    ours, paper = table.where(source="measured"), table.where(source="published")
    runs = [run for run in ours.distinct("run") if not run.endswith("step 1")]
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    summary = [["", "top-1 here", "published", "|w| < 0.05", "|w| > 0.9"]]
    for axes, run in zip(panels.flat, runs, strict=True):
        epochs = sorted(set(ours.where(run=run).numbers("epoch")))
        for index, epoch in enumerate(epochs):
            found = ours.where(run=run, epoch=f"{epoch:.0f}", seed="0")
            left, right, share = map(found.numbers, ("left", "right", "share"))
            shade = plt.get_cmap("viridis")(index / max(len(epochs) - 1, 1))
            axes.stairs(share, [*left, right[-1]], color=shade, label=f"epoch {epoch:.0f}")
        here, known = found.mean("top1"), paper.where(run=run).mean("top1")
        axes.set_title(f"{run}: {here:.2f} % (published {known:.2f} %)", fontsize=10)
        axes.set(yscale="log", ylabel="share of the weights")
        middle = np.abs(left + right) / 2
        near, far = share[middle < 0.05].sum(), share[middle > 0.9].sum()
        summary.append([run, text(here), text(known), f"{near:.1%}", f"{far:.2%}"])
    panels[0, 0].legend(fontsize=7, ncols=2)
    for axes in panels[-1]:
        axes.set_xlabel("latent weight")
    print_table(summary)
    return figure


def draw_rates(table: Table) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    titles = {"measured": "here", "published": "published (ImageNet)"}
    summary = [["", "optimizer", "learning rate", "top-1"]]
    for axes, (source, title) in zip(panels, titles.items(), strict=True):
        for optimizer in table.distinct("optimizer"):
            rows = table.where(source=source, optimizer=optimizer)
            rates = rows.distinct("learning_rate")
            found = [rows.where(learning_rate=rate).numbers("top1") for rate in rates]
            means = [values.mean() for values in found]
            axes.plot(list(map(float, rates)), means, "o-", color=COLOURS[optimizer])
            axes.plot([], [], "o-", color=COLOURS[optimizer], label=optimizer)
            for rate, values in zip(rates, found, strict=True):
                axes.plot([float(rate)] * len(values), values, "k.", markersize=4)
                summary.append([title, optimizer, f"{float(rate):g}", with_spread(values)])
        axes.set(xscale="log", xlabel="initial learning rate", ylabel="top-1 %", title=title)
    panels[0].legend()
    print_table(summary)
    return figure


DRAWINGS: dict[str, Callable[[Table], Figure]] = {
    "table1": draw_table1,
    "table2": draw_accuracies,
    "table3": draw_accuracies,
    "table4": draw_accuracies,
    "fig1": draw_surfaces,
    "fig2": draw_curves,
    "fig3": draw_activations,
    "fig4": kernel_drawing("cam", "CAM"),
    "fig5": kernel_drawing("update_cam", "update CAM"),
    "fig6": draw_two_nodes,
    "fig7": draw_latents,
    "fig8": draw_rates,
    "precision": draw_accuracies,
}


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", help=", ".join(DRAWINGS))
    parser.add_argument("table", type=Path, help="CSV of run_experiment.py")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file")
    arguments = parser.parse_args()
    if arguments.name not in DRAWINGS:
        raise UserError(f"unknown experiment {arguments.name!r}: there are {', '.join(DRAWINGS)}")
    figure = DRAWINGS[arguments.name](Table.read(arguments.table))
    atomic_write(arguments.picture, lambda file: figure.savefig(file, format="png", dpi=110))


if __name__ == "__main__":
    main()
