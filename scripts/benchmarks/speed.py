"""How fast this machine trains, evaluates and loads: ours against the reference, side by side.

    python -m scripts.benchmarks.speed --only step --cases "bfloat16, compiled" --batches 8
    python -m scripts.benchmarks.speed --output docs/results/speed [--teacher]
    python -m scripts.benchmarks.speed --output docs/results/speed --redraw

step        a training step; the reference is composed from elementary operations
            (models/reference.py), in float32, eager and NCHW
evaluation  a forward pass, against the same
measures    a training step without and with the live measures of its signs
loader      loading images in one process, against the released transforms
workers     batches of a training run's loader, by its number of processes

Each line is measured in a process of its own.  --output writes `results.json`, from it `table.md`
and `speed.png` (these two again with --redraw), and `profile.txt`, the costliest operations of the
last step.  Loading leaves nvimagecodec out where requirements-decoder.txt is not installed.
"""

import argparse
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import product
from statistics import median

import torch
from matplotlib.figure import Figure

from models import MODELS
from scripts.benchmarks import loading, timing, training
from scripts.benchmarks.page import add_output_options, table, write_page
from scripts.benchmarks.training import PEAK, SAVED, TEACHER
from utils.data.decode import DECODERS, nvimagecodec
from utils.data.loader import usable_cores
from utils.data.transforms import RESIZE
from utils.run.command_line import Parser, command, positive
from utils.run.errors import UserError

PASSES = ["step", "evaluation", "measures"]
LOADING = ["loader", "workers"]
PAGE = ["step", "evaluation", *LOADING]  # of what is measured

COMPILED = {"compile": True, "channels_last": True}
CASES = {
    "float32": {"precision": "float32"},
    "float32, compiled": {"precision": "float32", **COMPILED},
    "tf32": {"precision": "tf32"},
    "tf32, compiled": {"precision": "tf32", **COMPILED},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "bfloat16, compiled": {"precision": "bfloat16", **COMPILED},
    "bfloat16_residual, compiled": {"precision": "bfloat16_residual", **COMPILED},
}
if timing.DEVICE.type == "cpu":
    CASES = {name: case for name, case in CASES.items() if case["precision"] != "tf32"}


@command
def main() -> None:
    parser = Parser(__doc__)
    add_output_options(parser)
    batches = [64, 128, 256] if timing.DEVICE.type == "cuda" else [8, 16]
    parser.add_argument("--only", choices=[*PASSES, *LOADING], nargs="+", default=PAGE)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--model", choices=MODELS, default="reactnet_a")
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument("--batches", type=positive, nargs="+", default=batches)
    parser.add_argument("--teacher", action="store_true", help=f"steps with a {TEACHER}")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--images", type=positive, default=64, help="that a round of loader loads")
    write_page(parser.parse_args(), "speed.png", measure, as_markdown, draw)


def measure(arguments: argparse.Namespace) -> dict:
    has_gpu = timing.DEVICE.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if has_gpu else timing.processor(),
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
    passes = [what for what in PASSES if what in arguments.only]
    for what, batch, case in product(passes, arguments.batches, arguments.cases):
        teacher = TEACHER if arguments.teacher and what == "step" else None
        options = {"model": arguments.model, "teacher": teacher, **CASES[case]}
        config = training.step2_config(arguments.image_size, batch_size=batch, **options)
        profile = arguments.output and arguments.output / "profile.txt"
        with timing.fresh_process({}) as process:  # which shares no compiled code and no allocator
            comparison = process.submit(training.compare, what, config, arguments.rounds, profile)
            row = {"what": what, "case": case, "batch": batch} | comparison.result()
        print(table([pass_line(row)]), flush=True)
        yield row


def measure_loading(arguments: argparse.Namespace) -> Iterator[dict]:
    """The transforms of one process, and whole loaders with as many workers as there are cores."""
    decoders = list(DECODERS)
    try:
        nvimagecodec()
    except UserError as error:
        print(f"left out: {error}")
        decoders.remove("nvimagecodec")
    choices = list(product(decoders, RESIZE))
    workers = [0, *(2**n for n in range(8) if 2**n <= usable_cores())]
    cases = {"loader": (arguments.images, ()), "workers": (4 * arguments.images, workers)}
    for what in (what for what in LOADING if what in arguments.only):
        images, numbers = cases[what]
        options = images, arguments.image_size, arguments.rounds, choices, numbers
        with timing.fresh_process({}) as process:
            seconds = process.submit(loading.compare, *options).result()
        row = {"what": what, "images": images, "seconds": seconds}
        print(loading_table(row), flush=True)
        yield row


def as_markdown(results: dict) -> str:
    """What was measured where, and a line for each pass and for each way to load images."""
    teacher = "with" if results["teacher"] else "without"
    heading = (
        f"{results['network']}, {results['image_size']} pixels, steps {teacher} a teacher,"
        f" {results['date']}, {results['machine']}, torch {results['torch']}; medians of"
        f" {results['rounds']} interleaved rounds (lowest to highest)."
    )
    passes = [table(map(pass_line, results["rows"]))] if results["rows"] else []
    return "\n\n".join([heading, *passes, *map(loading_table, results["loading"])]) + "\n"


def pass_line(row: dict) -> dict[str, str]:
    theirs, ours = row["seconds"].values()
    line = {
        "": row["what"],
        "options": row["case"],
        "batch": str(row["batch"]),
        "reference, images/s": f"{row['batch'] / median(theirs):.1f}",
        "images/s (range)": rate_with_range(ours, row["batch"]),
        "times": f"{median(theirs) / median(ours):.2f}",
    }
    for note in (SAVED, PEAK):
        line[note] = " of ".join(f"{n:.1f}" for n in reversed(row["notes"].get(note, {}).values()))
    return line


def loading_table(row: dict) -> str:
    first = median(next(iter(row["seconds"].values())))
    return table(
        {
            row["what"]: side,
            "median, s": f"{median(seconds):.3f}",
            "images/s (range)": rate_with_range(seconds, row["images"]),
            "times": f"{first / median(seconds):.3f}",
        }
        for side, seconds in row["seconds"].items()
    )


def rates(seconds: Sequence[float], images: int) -> tuple[float, float, float]:
    """Images a second: lowest, median, highest."""
    return images / max(seconds), images / median(seconds), images / min(seconds)


def rate_with_range(seconds: Sequence[float], images: int) -> str:
    low, middle, high = rates(seconds, images)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def draw(results: dict) -> Figure:
    """Images a second of both sides, one panel for each kind of pass."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    passes = list(dict.fromkeys(row["what"] for row in results["rows"]))
    panels = figure.subplots(1, max(len(passes), 1), squeeze=False)[0]
    for axes, what in zip(panels, passes, strict=False):
        rows = [row for row in reversed(results["rows"]) if row["what"] == what]
        for place, row in enumerate(rows):
            sides = zip(row["seconds"].items(), (0.2, -0.2), ("tab:gray", "tab:blue"), strict=True)
            for (side, seconds), shift, colour in sides:
                low, middle, high = rates(seconds, row["batch"])
                label = side if place == 0 else None
                spread = [[middle - low], [high - middle]]
                axes.barh(place + shift, middle, 0.36, xerr=spread, color=colour, label=label)
        names = [f"{row['case']}, batch {row['batch']}" for row in rows]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(title=what, xlabel="images/s", xlim=(0, None))
        axes.legend(fontsize=8)
    figure.suptitle(f"{results['network']}, {results['machine']}, {results['date']}", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
