"""Draw a table or figure of the paper from its CSV, and print its numbers as a Markdown table."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.experiments.table import Table, read_table
from utils.checkpoint.files import atomic_write
from utils.run.command_line import markdown_table

plt.switch_backend("Agg")
plt.rcParams["figure.constrained_layout.use"] = True

HERE_AND_PAPER = ("here", "published (ImageNet)")
COLOURS = {"SGD": "tab:orange", "Adam": "tab:blue"}
STAR = {"marker": "*", "s": 120, "edgecolors": "black", "linewidths": 0.6, "zorder": 3}
Drawing = tuple[Figure, list[list[str]]]  # and the rows of the Markdown table, header first


def mean_and_range(values: np.ndarray, form: str = ".2f") -> str:
    """The mean over seeds and, where there are several, the range; empty without any."""
    if not len(values):
        return ""
    mean = format(values.mean(), form)
    return mean if len(values) == 1 else f"{mean} ({values.min():{form}} to {values.max():{form}})"


def compare_runs(ours: Table, paper: Table, formats: Mapping[str, str]) -> list[list[str]]:
    """Our and the published values of each run side by side, for each column of `formats`."""
    header = [f"{column} {source}" for column in formats for source in ("here", "published")]
    rows = [["", "seeds", *header]]
    for run in dict.fromkeys(ours.distinct("run") + paper.distinct("run")):
        row = [run, str(len(ours.where(run=run)) or "")]
        for column, form in formats.items():
            for source in (ours, paper):
                row.append(mean_and_range(source.where(run=run).numbers(column), form))
        rows.append(row)
    return rows


def draw_table1(ours: Table, paper: Table) -> Drawing:
    formats = {"ff_ratio": ".2e", "c2i_ratio": ".4f", "top1": ".2f"}
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.5))
    for axes, title, source in zip(panels, HERE_AND_PAPER, (ours, paper), strict=True):
        for place, run in enumerate(ours.distinct("run")):
            rows = source.where(run=run)
            if run.startswith("step 1") or not rows:
                continue
            marker = "s" if run.startswith("two-step") else "o"
            x, y, top1 = (rows.numbers(column).mean() for column in formats)
            label = f"{run}: {top1:.2f} %"
            axes.scatter(x, y, s=60, color=f"C{place}", marker=marker, label=label)
        axes.set(xscale="log", xlabel="FF ratio", ylabel="C2I ratio", title=title)
        axes.margins(0.1)
        axes.legend(title="run (weight decay): top-1", fontsize=8, title_fontsize=8)
    return figure, compare_runs(ours, paper, formats)


def draw_accuracies(ours: Table, paper: Table) -> Drawing:
    """A bar for the mean of each run, dots for single seeds."""
    sources = [ours, paper] if paper else [ours]
    figure, panels = plt.subplots(1, len(sources), figsize=(11, 4.5), squeeze=False)
    for axes, title, source in zip(panels[0], HERE_AND_PAPER, sources, strict=False):
        runs = source.distinct("run")[::-1]
        for place, run in enumerate(runs):
            values = source.where(run=run).numbers("top1")
            axes.barh(place, values.mean(), color="tab:blue", alpha=0.6)
            axes.plot(values, [place] * len(values), "k.", markersize=4)
            axes.text(values.max(), place, f" {values.mean():.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(runs)), runs, fontsize=8)
        axes.margins(x=0.15, y=0.5 / len(runs))
        axes.set(title=title, xlabel="top-1 %")
    return figure, compare_runs(ours, paper, {"top1": ".2f", "top5": ".2f"})


def draw_surfaces(ours: Table, paper: Table) -> Drawing:
    """Of the first seed."""
    runs = ours.distinct("run")
    low = ours.numbers("loss").min()
    # Far corners would flatten the rest: the scale ends within the surface that is lower there.
    high = min(np.quantile(ours.where(run=run).numbers("loss"), 0.95) for run in runs)
    colours = {"vmin": low, "vmax": high, "cmap": "viridis"}
    figure = plt.figure(figsize=(11, 9))
    summary = [["", "loss at the centre", "at distance 0.5", "at the corners"]]
    for place, run in enumerate(runs, start=1):
        rows = ours.where(run=run, seed=ours.distinct("seed")[0])
        points, alphas = np.unique(rows.numbers("alpha"), return_inverse=True)
        betas = np.searchsorted(points, rows.numbers("beta"))
        loss = np.full((len(points), len(points)), np.nan)
        loss[alphas, betas] = rows.numbers("loss")
        first, second = np.meshgrid(points, points, indexing="ij")
        axes = figure.add_subplot(2, len(runs), place, projection="3d")
        axes.plot_surface(first, second, loss.clip(max=high), rstride=1, cstride=1, **colours)
        axes.set(title=run, zlim=(low, high), zlabel="loss", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axes = figure.add_subplot(2, len(runs), len(runs) + place)
        levels = np.linspace(low, high, 25)
        shades = axes.contourf(first, second, loss, levels, extend="both", **colours)
        axes.set(aspect="equal", xlabel="direction 1", ylabel="direction 2")
        centre = loss[len(points) // 2, len(points) // 2]
        ring = np.abs(np.hypot(first, second) - 0.5) < (points[1] - points[0]) / 2
        corners = loss[[0, 0, -1, -1], [0, -1, 0, -1]]
        summary.append([run, f"{centre:.2f}", f"{loss[ring].mean():.2f}", f"{corners.mean():.2f}"])
    figure.colorbar(shades, ax=figure.axes, label="cross-entropy", shrink=0.6)
    return figure, summary


def draw_curves(ours: Table, paper: Table) -> Drawing:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    summary = [["", "training", "validation", "validation published"]]
    for run in ours.distinct("run"):
        kind, optimizer = run.split(", ")
        axes, colour = panels[int(kind == "binary")], COLOURS[optimizer]
        epochs = ours.where(run=run).distinct("epoch")
        row = [run]
        splits = (("train_top1", "training", "--"), ("val_top1", "validation", "-"))
        for column, split, style in splits:
            values = [ours.where(run=run, epoch=epoch).numbers(column) for epoch in epochs]
            means = np.mean(values, axis=1)
            label = f"{optimizer}, {split}"
            axes.plot(list(map(int, epochs)), means, style, color=colour, label=label)
            row.append(f"{means[-1]:.2f}")
        published = paper.where(run=run).numbers("val_top1")
        axes.scatter([int(epochs[-1])] * len(published), published, color=colour, **STAR)
        axes.set(title=kind, xlabel="epoch", ylabel="top-1 %")
        summary.append([*row, mean_and_range(published, ".0f")])
    panels[0].scatter([], [], color="white", **STAR, label="published end (ImageNet)")
    panels[0].legend(fontsize=8)
    return figure, summary


def draw_activations(ours: Table, paper: Table) -> Drawing:
    runs = ours.distinct("run")
    figure, panels = plt.subplots(len(runs), 2, figsize=(10, 6), sharex=True, sharey=True)
    summary = [["", "epoch", "saturation here", "published"]]
    cases = [(run, epoch) for run in runs for epoch in ("first", "last")]
    for axes, (run, epoch) in zip(panels.flat, cases, strict=True):
        rows = ours.where(run=run, epoch=epoch)
        bins = (len(rows.distinct("seed")), -1)  # of each seed the same
        columns = (rows.numbers(column) for column in ("left", "right", "share"))
        left, right, share = (column.reshape(bins).mean(0) for column in columns)
        is_inside = (left >= -1 - 1e-9) & (right <= 1 + 1e-9)
        colours = np.where(is_inside, "tab:blue", "tab:red")
        axes.bar(left, share, right - left, align="edge", color=colours)
        here = rows.numbers("saturation").mean()
        published = paper.where(run=run, epoch=epoch).numbers("saturation").mean()
        title = f"{run}, {epoch} epoch: {here:.1%} saturated (published {published:.1%})"
        axes.set_title(title, fontsize=9)
        summary.append([run, epoch, f"{here:.2%}", f"{published:.2%}"])
    figure.supxlabel("input of the first Sign (red: saturated)", fontsize="medium")
    return figure, summary


def draw_kernels(ours: Table, paper: Table, column: str, label: str) -> Drawing:
    """One bar per kernel for both optimizers, with Adam's smallest as a line."""
    smallest = ours.where(run="Adam").numbers(column).min()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    summary = [["", f"smallest {label}", "standard deviation", "below Adam's smallest"]]
    for axes, run in zip(panels, ("SGD", "Adam"), strict=True):
        values = ours.where(run=run).numbers(column)
        axes.bar(range(len(values)), values, color=COLOURS[run])
        axes.axhline(smallest, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=run, xlabel="kernel", ylabel=label)
        below = (values < smallest).mean()
        summary.append([run, f"{values.min():.3g}", f"{values.std():.3e}", f"{below:.1%}"])
    for row in paper:
        published = [row.get(name) or "" for name in ("smallest_cam", "sdam", "share_below")]
        summary.append([f"{row['run']}, published", *published])
    return figure, summary


def draw_two_nodes(ours: Table, paper: Table) -> Drawing:
    axis = np.linspace(-3, 3, 121)
    x, y = np.meshgrid(axis, axis)
    surfaces = {
        "forward: Sign(x) + Sign(y)": np.where(x < 0, -1, 1) + np.where(y < 0, -1, 1),
        "backward: clip(x) + clip(y)": x.clip(-1, 1) + y.clip(-1, 1),
    }
    figure, panels = plt.subplots(1, 2, figsize=(11, 5))
    for axes, (title, height) in zip(panels, surfaces.items(), strict=True):
        shades = axes.contourf(x, y, height, np.linspace(-2, 2, 17), cmap="Greys", alpha=0.7)
        for run in ours.distinct("run"):
            path, end = ours.where(run=run), paper.where(run=run)
            axes.plot(path.numbers("x"), path.numbers("y"), color=COLOURS[run], label=run)
            axes.scatter(end.numbers("x"), end.numbers("y"), color=COLOURS[run], **STAR)
        axes.scatter([], [], color="white", **STAR, label="published end")
        axes.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    panels[0].legend(loc="upper right", fontsize=8)
    figure.colorbar(shades, ax=panels, shrink=0.8)
    summary = [["", "ends at x", "y", "published x", "y"]]
    for run in ours.distinct("run"):
        here = [f"{ours.where(run=run).numbers(name)[-1]:.2f}" for name in "xy"]
        published = [f"{paper.where(run=run).numbers(name).mean():.1f}" for name in "xy"]
        summary.append([run, *here, *published])
    return figure, summary


def draw_latents(ours: Table, paper: Table) -> Drawing:
    """Of seed 0."""
    runs = [run for run in ours.distinct("run") if not run.endswith("step 1")]
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    summary = [["", "top-1 here", "published", "|w| < 0.05", "|w| > 0.9"]]
    for axes, run in zip(panels.flat, runs, strict=True):
        epochs = ours.where(run=run).distinct("epoch")
        shades = plt.get_cmap("viridis")(np.linspace(0, 1, len(epochs)))
        for epoch, shade in zip(epochs, shades, strict=True):
            rows = ours.where(run=run, epoch=epoch, seed="0")
            left, right, share = map(rows.numbers, ("left", "right", "share"))
            axes.stairs(share, [*left, right[-1]], color=shade, label=f"epoch {epoch}")
        here, published = (t.numbers("top1").mean() for t in (rows, paper.where(run=run)))
        axes.set_title(f"{run}: {here:.2f} % (published {published:.2f} %)", fontsize=10)
        axes.set(yscale="log", ylabel="share of the weights")
        middle = np.abs(left + right) / 2
        near, far = share[middle < 0.05].sum(), share[middle > 0.9].sum()
        summary.append([run, f"{here:.2f}", f"{published:.2f}", f"{near:.1%}", f"{far:.2%}"])
    panels[0, 0].legend(fontsize=7, ncols=2)
    figure.supxlabel("latent weight", fontsize="medium")
    return figure, summary


def draw_rates(ours: Table, paper: Table) -> Drawing:
    """The mean over seeds at each rate as a line, single seeds as dots."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    summary = [["", "optimizer", "learning rate", "top-1"]]
    for axes, title, source in zip(panels, HERE_AND_PAPER, (ours, paper), strict=True):
        for optimizer in ours.distinct("optimizer"):
            rows = source.where(optimizer=optimizer)
            rates, top1 = rows.numbers("learning_rate"), rows.numbers("top1")
            axes.plot(rates, top1, "k.", markersize=4, zorder=3)
            seeds = {rate: top1[rates == rate] for rate in np.unique(rates)}
            means = [values.mean() for values in seeds.values()]
            axes.plot(list(seeds), means, "o-", color=COLOURS[optimizer], label=optimizer)
            for rate, values in seeds.items():
                summary.append([title, optimizer, f"{rate:g}", mean_and_range(values)])
        axes.set(xscale="log", xlabel="initial learning rate", ylabel="top-1 %", title=title)
    panels[0].legend()
    return figure, summary


# Experiments that are more than accuracies side by side.
DRAWINGS: dict[str, Callable[[Table, Table], Drawing]] = {
    "table1": draw_table1,
    "fig1": draw_surfaces,
    "fig2": draw_curves,
    "fig3": draw_activations,
    "fig4": functools.partial(draw_kernels, column="cam", label="CAM"),
    "fig5": functools.partial(draw_kernels, column="update_cam", label="update CAM"),
    "fig6": draw_two_nodes,
    "fig7": draw_latents,
    "fig8": draw_rates,
}


def draw(name: str, table: Path, picture: Path) -> None:
    """Draw the CSV `table` of experiment `name` as a PNG file, and print its Markdown table.

    Raises:
        UserError: a CSV that cannot be read or is not of this experiment.
    """
    rows = read_table(table)
    ours, paper = rows.where(source="measured"), rows.where(source="published")
    figure, summary = DRAWINGS.get(name, draw_accuracies)(ours, paper)
    print(markdown_table(summary))
    atomic_write(picture, lambda file: figure.savefig(file, format="png", dpi=110))
