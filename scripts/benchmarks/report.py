"""How fast this machine trains and evaluates, by options and batch size.

    mkdir -p docs/results/speed
    python -m scripts.benchmarks speed --output docs/results/speed [--batches 8 16] [--teacher]
    python -m scripts.benchmarks speed --output docs/results/speed --redraw

Runs `step` and `evaluation` for each case and batch, then `loader` and `workers`, each in a process
of its own.  Writes `results.json`, `table.md` and `speed.png` (the last two again with --redraw),
and `profile.txt`, the costliest operations of the last step.  Needs requirements-decoder.txt.
"""

import argparse
import os
from collections.abc import Iterator
from datetime import date
from itertools import product
from statistics import median

import torch
from matplotlib.figure import Figure

from models import MODELS
from scripts.benchmarks import loading, timing, training
from scripts.benchmarks.page import add_output_options, table, write_page
from scripts.benchmarks.timing import DEVICE, describe, in_fresh_process, rate_with_range
from scripts.benchmarks.training import PEAK, SAVED, TEACHER
from utils.data.decode import DECODERS
from utils.data.transforms import RESIZE
from utils.run.command_line import Parser, positive

COMPILED = {"compile": True, "channels_last": True}
CASES = {
    "float32": {"precision": "float32"},
    "float32, compiled": {"precision": "float32", **COMPILED},
    "tf32": {"precision": "tf32"},
    "tf32, compiled": {"precision": "tf32", **COMPILED},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "bfloat16, compiled": {"precision": "bfloat16", **COMPILED},
}
if DEVICE.type == "cpu":
    CASES = {name: case for name, case in CASES.items() if case["precision"] != "tf32"}


def add_options(parser: Parser) -> None:
    batches = [64, 128, 256] if DEVICE.type == "cuda" else [8, 16]
    add_output_options(parser)
    parser.add_argument("--model", choices=MODELS, default="reactnet_a")
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument("--batches", type=positive, nargs="+", default=batches)
    parser.add_argument("--teacher", action="store_true", help=f"steps with a {TEACHER}")
    parser.add_argument("--rounds", type=positive, default=5)


def run(what: str, arguments: argparse.Namespace) -> None:
    write_page(arguments, "speed.png", measure, as_markdown, draw)


def measure(arguments: argparse.Namespace) -> dict:
    return {
        "date": date.today().isoformat(),
        "machine": timing.accelerator(),
        "torch": torch.__version__,
        "network": arguments.model,
        "image_size": arguments.image_size,
        "teacher": arguments.teacher,
        "rounds": arguments.rounds,
        "rows": list(measure_passes(arguments)),
        "loading": list(measure_loading(arguments)),
    }


def measure_passes(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each kind of pass, batch and case."""
    last_step = ("step", arguments.batches[-1], list(CASES)[-1])
    for what, batch, name in product(("step", "evaluation"), arguments.batches, CASES):
        print(f"\n{what}, {name}, batch {batch}", flush=True)
        teacher = TEACHER if arguments.teacher and what == "step" else None
        options = {"model": arguments.model, "teacher": teacher, **CASES[name]}
        config = training.step2_config(arguments.image_size, batch_size=batch, **options)
        profile = arguments.output / "profile.txt" if (what, batch, name) == last_step else None
        comparison = in_fresh_process(
            training.compare, what, config, arguments.rounds, profile=profile
        )
        print(describe(comparison, batch), flush=True)
        row = {"what": what, "case": name, "precision": config.precision, "batch": batch}
        yield row | comparison


def measure_loading(arguments: argparse.Namespace) -> Iterator[dict]:
    """The transforms of one process, and whole loaders with as many workers as there are cores."""
    choices = list(product(DECODERS, RESIZE))
    workers = [0, *(2**n for n in range(8) if 2**n <= os.cpu_count())]
    for what, images, numbers in (("loader", 64, ()), ("workers", 256, workers)):
        print(f"\n{what}", flush=True)
        comparison = in_fresh_process(
            loading.compare, images, arguments.image_size, arguments.rounds, choices, numbers
        )
        print(describe(comparison, images), flush=True)
        yield {"what": what, "images": images} | comparison


def as_markdown(results: dict) -> str:
    """What was measured where, and a line for each pass and for each way to load images."""
    teacher = "with" if results["teacher"] else "without"
    return (
        f"{results['network']}, {results['image_size']} pixels, steps {teacher} a teacher,"
        f" {results['date']}, {results['machine']}, torch {results['torch']}; medians of"
        f" {results['rounds']} interleaved rounds (lowest to highest).\n\n"
        f"{table(map(pass_line, results['rows']))}\n\n"
        + "\n\n".join(describe(row, row["images"], row["what"]) for row in results["loading"])
        + "\n"
    )


def pass_line(row: dict) -> dict[str, str]:
    ours, reference = row["seconds"]["ours"], row["seconds"]["reference"]
    line = {
        "": row["what"],
        "options": row["case"],
        "batch": str(row["batch"]),
        "reference, images/s": f"{row['batch'] / median(reference):.1f}",
        "images/s (range)": rate_with_range(ours, row["batch"]),
        "times": f"{median(reference) / median(ours):.2f}",
    }
    for note in (SAVED, PEAK):
        values = row["notes"].get(note) if row["what"] == "step" else None
        line[note] = f"{values['ours']:.1f} of {values['reference']:.1f}" if values else ""
    return line


def draw(results: dict) -> Figure:
    """Images a second of both sides, one panel for each kind of pass."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("step", "evaluation"), strict=True):
        rows = [row for row in reversed(results["rows"]) if row["what"] == what]
        for place, row in enumerate(rows):
            for side, shift, colour in (("reference", 0.2, "tab:gray"), ("ours", -0.2, "tab:blue")):
                low, middle, high = timing.rates(row["seconds"][side], row["batch"])
                label = side if place == 0 else None
                spread = [[middle - low], [high - middle]]
                axes.barh(place + shift, middle, 0.36, xerr=spread, color=colour, label=label)
        names = [f"{row['case']}, batch {row['batch']}" for row in rows]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(title=what, xlabel="images/s", xlim=(0, None))
        axes.legend(fontsize=8)
    figure.suptitle(f"{results['network']}, {results['machine']}, {results['date']}", fontsize=10)
    return figure
