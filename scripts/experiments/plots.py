"""Draw a table or figure of the paper from its CSV, and make a Markdown table of its numbers."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.experiments.table import Table, read_table
from scripts.experiments.verdicts import margin_of
from utils.checkpoint.files import atomic_write
from utils.run.command_line import markdown_table
from utils.run.errors import UserError

plt.switch_backend("Agg")
plt.rcParams["figure.constrained_layout.use"] = True
# Lines differ in more than their colour, for who prints them.
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), "-", "--", "-."]
MARKERS = ["o", "s", "^", "v", "D", "P", "X", "<", ">", "p"]

HERE_AND_PAPER = ("here", "published (ImageNet)")
OPTIMIZERS = {
    "SGD": {"color": "tab:orange", "linestyle": "--", "marker": "s"},
    "Adam": {"color": "tab:blue", "linestyle": "-", "marker": "o"},
}
STAR = {"marker": "*", "s": 120, "edgecolors": "black", "linewidths": 0.6, "zorder": 3}
TRIANGLE = {"marker": "^", "edgecolors": "black", "zorder": 3}
# Columns of the Markdown tables.
ACCURACY = {"top1": ".2f", "top5": ".2f"}
STABILITY = {"ff_ratio": ".2e", "c2i_ratio": ".4f", "top1": ".2f", "decay_to_gradient": ".2g"}
Drawing = tuple[Figure, list[list[str]]]  # and the rows of the Markdown table, header first


def mean_and_margin(values: np.ndarray, form: str = ".2f") -> str:
    """The mean over seeds and, of three or more, half of its 95 % interval; empty without any."""
    if not len(values):
        return ""
    mean, margin = format(values.mean(), form), margin_of(values)
    return f"{mean} ± {margin:{form}}" if math.isfinite(margin) else mean


def bar(values: np.ndarray) -> float:
    """The length of an error bar: half of the 95 % interval, of fewer than three seeds nothing."""
    return np.nan_to_num(margin_of(values), posinf=0)


def over_seeds(rows: Table, axis: str, column: str) -> np.ndarray:
    """(4, n): the values of `axis`, rising, and mean, minimum and maximum of `column` at each."""
    points = []
    for place, there in rows.split(axis).items():
        values = there.numbers(column)
        points.append((float(place), values.mean(), values.min(), values.max()))
    return np.array(sorted(points)).T


def of_each_seed(rows: Table, column: str, reduce: Callable = np.mean) -> np.ndarray:
    return np.array([reduce(seed.numbers(column)) for seed in rows.split("seed").values()])


def mean_histogram(rows: Table) -> Iterator[np.ndarray]:
    """Left and right ends of the bins, which all seeds share, and the mean share in each."""
    seeds = len(rows.distinct("seed"))
    return (rows.numbers(name).reshape(seeds, -1).mean(0) for name in ("left", "right", "share"))


def draw_line(axes: Axes, rows: Table, column: str, **style: Any) -> None:
    """The mean over seeds against epochs, and their range as a shade."""
    epochs, mean, low, high = over_seeds(rows, "epoch", column)
    (line,) = axes.plot(epochs, mean, markevery=0.2, markersize=4, **style)
    axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def compare_runs(ours: Table, paper: Table, formats: Mapping[str, str]) -> list[list[str]]:
    """Our and the published values, where there are any, of each run side by side."""
    columns = [
        (f"{column} {name}", source, column)
        for column in formats
        for name, source in (("here", ours), ("published", paper))
        if source is ours or len(paper.numbers(column))
    ]
    rows = [["", "seeds", *(title for title, *_ in columns)]]
    for run in dict.fromkeys(ours.distinct("run") + paper.distinct("run")):
        cells = [str(len(ours.where(run=run)) or "")]
        for _, source, column in columns:
            values = source.where(run=run).numbers(column)
            cells.append(mean_and_margin(values, formats[column]))
        rows.append([run, *cells])
    return rows


def here_and_paper(
    ours: Table, paper: Table, height: float
) -> tuple[Figure, list[tuple[Axes, Table]]]:
    """A figure with a panel of our rows and, where there are any, one of the published ones."""
    sources = [ours, paper] if paper else [ours]
    figure, panels = plt.subplots(1, len(sources), figsize=(11, height), squeeze=False)
    for axes, title in zip(panels[0], HERE_AND_PAPER, strict=False):
        axes.set_title(title)
    return figure, list(zip(panels[0], sources, strict=True))


def draw_stability(ours: Table, paper: Table, named: str = "run") -> Drawing:
    """C2I against FF: the mean of each run with its interval; runs are `named` in the legend."""
    figure, panels = here_and_paper(ours, paper, height=5.5)
    runs = [run for run in ours.distinct("run") if not run.startswith("step 1")]
    for axes, source in panels:
        squares = itertools.cycle(("none", "full"))
        for place, run in enumerate(runs):
            rows = source.where(run=run)
            if not rows:
                continue
            look = {"color": f"C{place}", "linestyle": "", "capsize": 3}
            if run.startswith("two-step"):
                look |= {"marker": "s", "fillstyle": next(squares)}
            else:
                look |= {"marker": MARKERS[2 + place % 8]}
            ff, c2i, top1 = (rows.numbers(name) for name in ("ff_ratio", "c2i_ratio", "top1"))
            label = f"{run}: {top1.mean():.2f} %"
            axes.errorbar(ff.mean(), c2i.mean(), bar(c2i), bar(ff), label=label, **look)
        axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")  # nothing of the start left
        axes.set(xscale="log", xlabel="FF ratio", ylabel="C2I ratio")
        axes.margins(0.1)
        axes.legend(title=f"{named}: top-1", fontsize=8, title_fontsize=8)
    return figure, compare_runs(ours, paper, STABILITY)


def draw_stability_by_epoch(ours: Table, paper: Table) -> Drawing:
    """FF and C2I against epochs, without the runs of step 1."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5))
    summary = [["", "FF, first epoch", "FF, last", "C2I, first epoch", "C2I, last"]]
    columns = {"ff_ratio": ".2e", "c2i_ratio": ".4f"}
    runs = [run for run in ours.distinct("run") if not run.startswith("step 1")]
    for place, run in enumerate(runs):
        rows, cells = ours.where(run=run), [run]
        style = {"linestyle": DASHES[place % 10], "marker": MARKERS[place % 10]}
        for axes, (column, form) in zip(panels, columns.items(), strict=True):
            draw_line(axes, rows, column, label=run, **style)
            _, means, *_ = over_seeds(rows, "epoch", column)
            cells += [format(mean, form) for mean in means[[0, -1]]]
        summary.append(cells)
    panels[0].set(yscale="log", xlabel="epoch", ylabel="FF ratio")
    panels[1].axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    panels[1].set(xlabel="epoch", ylabel="C2I ratio")
    panels[1].legend(fontsize=7)
    return figure, summary


def draw_accuracies(ours: Table, paper: Table, columns: Mapping[str, str] = ACCURACY) -> Drawing:
    """The mean of each run with its interval, dots for single seeds."""
    figure, panels = here_and_paper(ours, paper, height=4.5)
    for axes, source in panels:
        runs = source.distinct("run")[::-1]
        for place, run in enumerate(runs):
            values = source.where(run=run).numbers("top1")
            look = {"fmt": "D", "mfc": "white", "color": "tab:blue", "capsize": 4}
            axes.errorbar(values.mean(), place, xerr=bar(values), **look)
            axes.plot(values, [place] * len(values), "k.", markersize=4)
            right = max(values.max(), values.mean() + bar(values))
            axes.text(right, place, f"  {values.mean():.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(runs)), runs, fontsize=8)
        axes.margins(x=0.15, y=0.5 / len(runs))
        axes.grid(axis="y", linewidth=0.4)
        axes.set(xlabel="top-1 %")
    return figure, compare_runs(ours, paper, columns)


def draw_surfaces(ours: Table, paper: Table) -> Drawing:
    """The surface of the first seed, and the rise of the loss with the distance over all seeds."""
    cases = [(run, norm) for norm in ours.distinct("batch_norm") for run in ours.distinct("run")]
    tables = [ours.where(run=run, batch_norm=norm) for run, norm in cases]
    # Far corners would flatten the rest: the scale ends within the surface that is lower there.
    top = max(min(np.quantile(rows.numbers("rise"), 0.95) for rows in tables), 0.01)
    levels = np.linspace(0, top, 13)
    figure, panels = plt.subplots(2, len(cases), figsize=(3.6 * len(cases), 7), squeeze=False)
    summary = [["", "BN", "rise at 0.1", "at 0.5", "at 1"]]
    for (run, norm), rows, (above, below) in zip(cases, tables, panels.T, strict=True):
        one = rows.where(seed=ours[0]["seed"])
        points = np.unique(one.numbers("alpha"))
        rise = one.numbers("rise").reshape(len(points), -1)
        shades = above.contourf(points, points, rise.T, levels, extend="both", cmap="cividis")
        above.contour(points, points, rise.T, levels[1:], colors="black", linewidths=0.4)
        above.set(aspect="equal", title=f"{run}, BN {norm}", xlabel="direction 1")
        distances, means, lows, highs = over_seeds(rows, "distance", "rise")
        below.plot(distances, means, color="black")
        below.fill_between(distances, lows, highs, color="tab:blue", alpha=0.3, hatch="//")
        below.set(xlabel="distance from the centre", ylim=(-0.05 * top, 1.5 * top))
        at = [
            of_each_seed(rows.where(distance=distance), "rise") for distance in ("0.1", "0.5", "1")
        ]
        summary.append([run, norm, *(mean_and_margin(rises, ".3g") for rises in at)])
    panels[0, 0].set_ylabel("direction 2")
    panels[1, 0].set_ylabel("rise of the loss: mean and range")
    figure.colorbar(
        shades, ax=panels[0].tolist(), label="rise of the loss", shrink=0.8, format="%.2f"
    )
    return figure, summary


def draw_curves(ours: Table, paper: Table) -> Drawing:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    header = ["", "training", "training images as in validation", "validation"]
    summary = [[*header, "validation published"]]
    for run, rows in ours.split("run").items():
        kind, optimizer = run.split(", ")
        axes, look = panels[int(kind == "binary")], OPTIMIZERS[optimizer]
        splits = (("train_top1", "training", ":"), ("val_top1", "validation", "-"))
        for column, split, dashes in splits:
            style = look | {"linestyle": dashes, "label": f"{optimizer}, {split}"}
            draw_line(axes, rows, column, **style)
        last = rows.where(epoch=rows[-1]["epoch"])
        columns = ("train_top1", "fixed_train_top1", "val_top1")
        cells = [mean_and_margin(last.numbers(column)) for column in columns]
        published = paper.where(run=run).numbers("val_top1")
        summary.append([run, *cells, mean_and_margin(published, ".0f")])
        for values, marker in ((last.numbers("fixed_train_top1"), TRIANGLE), (published, STAR)):
            place = int(last[0]["epoch"]) + (0.6 if optimizer == "Adam" else 1.4)
            fill = look["color"] if optimizer == "Adam" else "white"
            axes.scatter([place] * len(values), values, color=fill, **marker)
        axes.set(title=kind, xlabel="epoch", ylabel="top-1 %")
    panels[0].scatter([], [], color="white", **STAR, label="published end (ImageNet; filled: Adam)")
    label = "training images as in validation (filled: Adam)"
    panels[0].scatter([], [], color="white", **TRIANGLE, label=label)
    panels[0].legend(fontsize=8)
    return figure, summary


def draw_activations(ours: Table, paper: Table) -> Drawing:
    cases = [(run, epoch) for run in ours.distinct("run") for epoch in ("first", "last")]
    layout = {"figsize": (10, 6), "sharex": True, "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(len(cases) // 2, 2, **layout)
    summary = [["", "epoch", "saturation here", "published"]]
    for axes, (run, epoch) in zip(panels.flat, cases, strict=True):
        rows = ours.where(run=run, epoch=epoch)
        left, right, share = mean_histogram(rows)
        is_inside = (left >= -1 - 1e-9) & (right <= 1 + 1e-9)
        for part, style in (
            (is_inside, {"color": "tab:blue"}),
            (~is_inside, {"color": "tab:red", "hatch": "///", "edgecolor": "white"}),
        ):
            axes.bar(left[part], share[part], (right - left)[part], align="edge", **style)
        here = of_each_seed(rows, "saturation")
        published = paper.where(run=run, epoch=epoch).numbers("saturation").mean()
        title = f"{run}, {epoch} epoch: {here.mean():.1%} saturated (published {published:.1%})"
        axes.set_title(title, fontsize=9)
        summary.append([run, epoch, mean_and_margin(here, ".2%"), f"{published:.2%}"])
    label = "input of the first Sign (hatched: saturated; the outermost bars hold all beyond)"
    figure.supxlabel(label, fontsize="medium")
    figure.supylabel("share", fontsize="medium")
    return figure, summary


def draw_layers(ours: Table, paper: Table) -> Drawing:
    """A panel for some layers: saturation above, SDAM below, against epochs."""
    layers, runs = ours.distinct("layer"), ours.distinct("run")
    shown = [layers[place] for place in np.linspace(0, len(layers) - 1, 4).round().astype(int)]
    figure, panels = plt.subplots(2, len(shown), figsize=(13, 6), sharex=True)
    columns = {"saturation": ".2%", "sdam": ".2e"}
    titles = {"saturation": "saturation", "sdam": "SDAM"}
    for above_and_below, layer in zip(panels.T, shown, strict=True):
        for axes, column in zip(above_and_below, columns, strict=True):
            for run, rows in ours.where(layer=layer).split("run").items():
                draw_line(axes, rows, column, label=run, **OPTIMIZERS[run])
            axes.set(title=f"layer {layer}", ylabel="" if layer != layers[0] else titles[column])
    panels[0, 0].legend()
    figure.supxlabel("epoch", fontsize="medium")
    header = [f"{title}, {run}" for title in titles.values() for run in runs]
    summary = [["layer, last epoch", *header]]
    for layer, rows in ours.where(epoch=ours[-1]["epoch"]).split("layer").items():
        cells = [layer]
        for column, form in columns.items():
            for run in runs:
                cells.append(mean_and_margin(rows.where(run=run).numbers(column), form))
        summary.append(cells)
    return figure, summary


def draw_kernels(ours: Table, paper: Table, column: str, label: str) -> Drawing:
    """A bar for each kernel, and as a line the smallest of Adam's of the same seed."""
    of_adam = ours.where(run="Adam").split("seed")
    smallest = {seed: rows.numbers(column).min() for seed, rows in of_adam.items()}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    summary = [["", f"smallest {label}", "standard deviation", "below Adam's smallest"]]
    for axes, (run, rows) in zip(panels, ours.split("run").items(), strict=False):
        values = rows.numbers(column)
        axes.bar(range(len(values)), values, color=OPTIMIZERS[run]["color"])
        seeds = rows.split("seed")
        lines = [smallest.get(seed, np.nan) for seed in seeds]
        places = np.linspace(-0.5, len(values) - 0.5, len(seeds) + 1)
        axes.stairs(lines, places, color="black", linewidth=0.8, linestyle="--", baseline=None)
        axes.set(title=run, xlabel="kernel, of all seeds", ylabel=label)
        least, spread = (of_each_seed(rows, column, reduce) for reduce in (np.min, np.std))
        paired = [(seeds[seed], smallest[seed]) for seed in seeds if seed in smallest]
        below = [(there.numbers(column) < bound).mean() for there, bound in paired]
        cells = mean_and_margin(least, ".3g"), mean_and_margin(spread, ".3g")
        summary.append([run, *cells, mean_and_margin(np.array(below), ".1%")])
    for row in paper:
        published = [row.get(name) or "" for name in ("smallest_cam", "sdam")]
        share = row.get("share_below")
        below = f"{float(share):.1%}" if share else ""
        summary.append([f"{row['run']}, published", *published, below])
    return figure, summary


def draw_two_nodes(ours: Table, paper: Table) -> Drawing:
    axis = np.linspace(-3, 3, 121)
    x, y = np.meshgrid(axis, axis)
    surfaces = {
        "forward: Sign(x) + Sign(y)": np.where(x < 0, -1, 1) + np.where(y < 0, -1, 1),
        "backward: clip(x) + clip(y)": x.clip(-1, 1) + y.clip(-1, 1),
    }
    figure, panels = plt.subplots(1, 2, figsize=(11, 5))
    summary = [["", "ends at x", "y", "published x", "y"]]
    for axes, (title, height) in zip(panels, surfaces.items(), strict=True):
        shades = axes.contourf(x, y, height, np.linspace(-2, 2, 17), cmap="Greys", alpha=0.7)
        for run, rows in ours.split("run").items():
            style = OPTIMIZERS[run] | {"marker": ""}
            for seed, path in rows.split("seed").items():
                label = run if seed == "0" else None
                axes.plot(path.numbers("x"), path.numbers("y"), **style, label=label)
            end = paper.where(run=run)
            axes.scatter(end.numbers("x"), end.numbers("y"), color=style["color"], **STAR)
        axes.scatter([], [], color="white", **STAR, label="published end")
        axes.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    panels[0].legend(loc="upper right", fontsize=8)
    figure.colorbar(shades, ax=panels, shrink=0.8)
    for run, ends in ours.where(step=ours[-1]["step"]).split("run").items():
        here = [mean_and_margin(ends.numbers(name)) for name in "xy"]
        published = [f"{paper.where(run=run).numbers(name).mean():.1f}" for name in "xy"]
        summary.append([run, *here, *published])
    return figure, summary


def draw_latents(ours: Table, paper: Table) -> Drawing:
    """The mean over seeds."""
    runs = ours.split("run")
    columns = (len(runs) + 1) // 2
    size = (5.5 * columns, 7)
    figure, panels = plt.subplots(2, columns, figsize=size, sharex=True, squeeze=False)
    header = ["", "top-1 here", "published", "sum of rates"]
    summary = [[*header, "|w| < 0.05", "0.5 < |w| < 0.7", "|w| > 0.9"]]
    for axes, (run, of_run) in zip(panels.flat, runs.items(), strict=False):
        epochs = of_run.split("epoch")
        shades = plt.get_cmap("viridis_r")(np.linspace(0, 1, len(epochs)))
        for place, (epoch, rows) in enumerate(epochs.items()):
            left, right, share = mean_histogram(rows)
            style = {"color": shades[place], "linewidth": 0.6 + 0.3 * place}
            axes.stairs(share, [*left, right[-1]], label=f"epoch {epoch}", **style)
        here, published = of_each_seed(rows, "top1"), paper.where(run=run).numbers("top1")
        axes.set_title(f"{run}: {here.mean():.2f} %", fontsize=10)
        axes.set(yscale="log", ylabel="share of the weights")
        axes.legend(fontsize=6, ncols=2)  # runs may differ in length
        middle = np.abs(left + right) / 2
        parts = middle < 0.05, (middle > 0.5) & (middle < 0.7), middle > 0.9
        cells = mean_and_margin(here), mean_and_margin(published), rows[-1]["rate_sum"]
        summary.append([run, *cells, *(f"{share[part].sum():.2%}" for part in parts)])
    figure.supxlabel("latent weight", fontsize="medium")
    return figure, summary


def draw_rates(ours: Table, paper: Table) -> Drawing:
    """The mean over seeds at each rate with its interval, single seeds as dots."""
    figure, panels = here_and_paper(ours, paper, height=4.5)
    summary = [["", "optimizer", "learning rate", "top-1"]]
    for axes, source in panels:
        for optimizer in ours.distinct("optimizer"):
            rows = source.where(optimizer=optimizer)
            rates, top1 = rows.numbers("learning_rate"), rows.numbers("top1")
            axes.plot(rates, top1, "k.", markersize=4, zorder=3)
            seeds = {rate: top1[rates == rate] for rate in np.unique(rates)}
            means, bars = ([f(values) for values in seeds.values()] for f in (np.mean, bar))
            style = {"capsize": 3, "label": optimizer, **OPTIMIZERS[optimizer]}
            axes.errorbar(list(seeds), means, bars, **style)
            for rate, values in seeds.items():
                cells = [axes.get_title(), optimizer, f"{rate:g}", mean_and_margin(values)]
                summary.append(cells)
        axes.set(xscale="log", xlabel="initial learning rate", ylabel="top-1 %")
    panels[0][0].legend()
    return figure, summary


# Experiments that are more than accuracies side by side.
DRAWINGS: dict[str, Callable[[Table, Table], Drawing]] = {
    "table1": functools.partial(draw_stability, named="run (weight decay)"),
    "table1_epochs": draw_stability_by_epoch,
    "fig1": draw_surfaces,
    "fig2": draw_curves,
    "fig3": draw_activations,
    "fig34_layers": draw_layers,
    "fig4": functools.partial(draw_kernels, column="cam", label="CAM"),
    "fig5": functools.partial(draw_kernels, column="update_cam", label="update CAM"),
    "fig6": draw_two_nodes,
    "fig7": draw_latents,
    "fig8": draw_rates,
    "beyond1": draw_stability,
    "scan": functools.partial(draw_accuracies, columns=STABILITY),
}


def draw(name: str, table: Path, picture: Path) -> str:
    """Draw the CSV `table` of experiment `name` as a PNG file, and return its Markdown table.

    Raises:
        UserError: a CSV that cannot be read, is not of this experiment or lacks cells.
    """
    rows = read_table(table)
    ours, paper = rows.where(source="measured"), rows.where(source="published")
    if not ours:
        raise UserError(f"{table} has no measured row: no run that it shows is finished")
    try:
        figure, summary = DRAWINGS.get(name, draw_accuracies)(ours, paper)
    except UserError:
        raise
    except (ValueError, IndexError) as error:
        raise UserError(f"{table} is incomplete or of another experiment: measure again") from error
    atomic_write(picture, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
    return markdown_table(summary)
