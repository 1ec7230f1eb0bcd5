"""How fast this machine trains and evaluates, by options and batch size, beside what limits it.

    python scripts/benchmark.py speed --output docs/results/speed [--batches 8 16] [--teacher]
    python scripts/benchmark.py speed --output docs/results/speed --redraw

Each line is `scripts/benchmark.py step` or `evaluation` in a process of its own, which runs the
composed network and ours in turn; `loader` and `workers` follow.  Writes `results.json`, from which
`table.md` and `speed.png` are made (again, with --redraw), and `profile.txt`, the costliest
operations of the last step.  Needs requirements-decoder.txt.

No pass is faster than either limit, for what this machine reaches in a large product of matrices or
a large convolution, the faster of the two, and in copying memory:

    arithmetic   multiply-accumulates: once forward, and twice more backward
    memory       what is kept for the backward pass is written and read; of each parameter the
                 weight is read three times and written once, the gradient is written and read,
                 and Adam's two moments are read and written
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import conv2d
from torchvision.models import ResNet34_Weights

from models import MODELS, build_model
from utils.run.command_line import Parser, command, positive
from utils.run.config import RESIZES
from utils.data.decode import DECODERS
from utils.run.errors import UserError
from utils.run.command_line import as_table
from scripts.count_ops import count_layers, total
from utils.precision import set_precision
from utils.results import accelerator, add_output_options, measure_and_draw

BENCHMARK = Path(__file__).with_name("benchmark.py")
TEACHER_MACS = 1e9 * ResNet34_Weights.DEFAULT.meta["_ops"]
ACCESSES_OF_A_PARAMETER = 10  # in float32, by a step
PROFILE = "profile.txt"


@dataclass(frozen=True)
class Case:
    """A way to compute the same passes."""

    name: str
    precision: str
    options: Sequence[str] = ()
    only_on_gpu: bool = False


COMPILED = ("--compile", "--channels_last")
CASES = (
    Case("float32", "float32"),
    Case("float32, compiled", "float32", COMPILED),
    Case("tf32", "tf32", only_on_gpu=True),
    Case("tf32, compiled", "tf32", COMPILED, only_on_gpu=True),
    Case("bfloat16", "bfloat16", ["--channels_last"]),
    Case("bfloat16, compiled", "bfloat16", COMPILED),
)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    add_output_options(parser)
    parser.add_argument("--model", choices=MODELS, default="reactnet_a")
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument(
        "--batches", type=positive, nargs="+", default=[64, 128, 256] if cuda else [8, 16]
    )
    parser.add_argument("--teacher", action="store_true", help="steps with a ResNet-34")
    parser.add_argument("--rounds", type=positive, default=5)
    return parser.parse_args()


@command
def main() -> None:
    measure_and_draw(parse(), "speed.png", measured, described, drawn)


def measured(arguments: argparse.Namespace) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = total(count_layers(build_model(arguments.model), arguments.image_size))
    reached = {
        precision: macs_per_second(device, precision)
        for precision in dict.fromkeys(case.precision for case in cases_on(device))
    }
    return {
        "date": date.today().isoformat(),
        "machine": accelerator(),
        "torch": torch.__version__,
        "network": arguments.model,
        "image_size": arguments.image_size,
        "teacher": arguments.teacher,
        "rounds": arguments.rounds,
        "macs": counts.flops + counts.bops,
        "parameters": counts.parameters,
        "macs_per_second": reached,
        "memory_bytes_per_second": memory_bytes_per_second(device),
        "rows": list(passes(device, arguments)),
        "loading": list(loading(arguments)),
    }


def cases_on(device: torch.device) -> list[Case]:
    return [case for case in CASES if device.type == "cuda" or not case.only_on_gpu]


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of ten calls."""
    found = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def macs_per_second(device: torch.device, precision: str) -> float:
    """Multiply-accumulates a second in a large product of matrices or convolution, the faster."""
    set_precision(precision)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    large = device.type == "cuda"
    side = 8192 if large else 2048
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    product = side**3 / best_seconds(lambda: left @ right, device)
    count, channels, size = 256 if large else 16, 512, 28
    images = torch.randn(count, channels, size, size, device=device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    kernels = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    macs = count * size**2 * kernels.numel()
    return max(product, macs / best_seconds(lambda: conv2d(images, kernels, padding=1), device))


def memory_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second in copying from one place to another."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def passes(device: torch.device, arguments: argparse.Namespace) -> Iterator[dict]:
    for what, batch in itertools.product(("step", "evaluation"), arguments.batches):
        for case in cases_on(device):
            flags = list(case.options)
            if arguments.teacher and what == "step":
                flags.append("--teacher")
            if (what, batch, case) == ("step", arguments.batches[-1], CASES[-1]):
                flags += ["--profile", str(arguments.output / PROFILE)]
            told = benchmark(
                what,
                flags,
                model=arguments.model,
                image_size=arguments.image_size,
                batch_size=batch,
                rounds=arguments.rounds,
                precision=case.precision,
            )
            yield {
                "what": what,
                "case": case.name,
                "precision": case.precision,
                "batch": batch,
                "seconds": told["seconds"],
                "notes": told["notes"],
            }


def loading(arguments: argparse.Namespace) -> Iterator[dict]:
    """The transforms of one process, and whole loaders with as many workers as there are cores."""
    numbers = [0, *(2**n for n in range(8) if 2**n <= os.cpu_count())]
    choices = ["--resize", *RESIZES, "--decoder", *DECODERS]
    flags = {"loader": choices, "workers": [*choices, "--workers", *map(str, numbers)]}
    for what, images in (("loader", 64), ("workers", 256)):
        told = benchmark(what, flags[what], batch_size=images, rounds=arguments.rounds)
        yield {"what": what, "images": images, "seconds": told["seconds"]}


def benchmark(what: str, flags: Sequence[str], **options: object) -> dict:
    """What `scripts/benchmark.py` tells of one comparison, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told.json"
        options["json"] = path
        told = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command_line = [what, *told, *flags]
        print("benchmark.py", *command_line, flush=True)
        if subprocess.run([sys.executable, str(BENCHMARK), *command_line]).returncode:
            raise UserError(f"this {what} could not be measured, as said above")
        return json.loads(path.read_text())


def limits(row: dict, results: dict) -> dict[str, float]:
    """Images a second that the row's pass cannot exceed, by what limits it."""
    is_step = row["what"] == "step"
    macs = results["macs"] * (3 if is_step else 1)
    if is_step and results["teacher"]:
        macs += TEACHER_MACS
    found = {"arithmetic": results["macs_per_second"][row["precision"]] / macs}
    if is_step:
        kept = 2**20 * row["notes"]["saved for backward, MiB/image"]["ours"]
        weights = 4 * ACCESSES_OF_A_PARAMETER * results["parameters"] / row["batch"]
        found["memory"] = results["memory_bytes_per_second"] / (2 * kept + weights)
    return found


def rates(row: dict, images: int) -> dict[str, list[float]]:
    """Images a second of each side, of so many images: lowest, median, highest."""
    return {
        side: [images / f(seconds) for f in (max, statistics.median, min)]
        for side, seconds in row["seconds"].items()
    }


def described(results: dict) -> str:
    """What was measured where, and a line for each pass, in Markdown."""
    header = ["", "options", "batch", "composed, images/s", "images/s (range)", "times"]
    header += ["kept, MiB/image", "peak, MiB"]
    header += ["arithmetic limit, images/s", "memory limit, images/s", "of the limit"]
    lines = [header]
    for row in results["rows"]:
        found = rates(row, row["batch"])
        (low, ours, high), composed = found["ours"], found["composed"][1]
        bound, notes = limits(row, results), row["notes"]
        kept = notes.get("saved for backward, MiB/image")
        peak = notes.get("peak memory, MiB")
        is_step = row["what"] == "step"
        lines.append(
            [
                row["what"],
                row["case"],
                str(row["batch"]),
                f"{composed:.1f}",
                f"{ours:.1f} ({low:.1f} to {high:.1f})",
                f"{ours / composed:.2f}",
                f"{kept['ours']:.1f} of {kept['composed']:.1f}" if is_step else "",
                f"{peak['ours']:.0f} of {peak['composed']:.0f}" if peak else "",
                f"{bound['arithmetic']:.0f}",
                f"{bound['memory']:.0f}" if is_step else "",
                f"{100 * ours / min(bound.values()):.0f} %",
            ]
        )
    teacher = "with" if results["teacher"] else "without"
    arithmetic = ", ".join(
        f"{macs / 1e9:.0f} G in {precision}"
        for precision, macs in results["macs_per_second"].items()
    )
    return (
        f"{results['network']}, {results['image_size']} pixels, steps {teacher} a teacher,"
        f" {results['date']}, {results['machine']}, torch {results['torch']}; medians of"
        f" {results['rounds']} interleaved rounds (lowest to highest). The machine reaches"
        f" {arithmetic} multiply-accumulates a second, and copies memory at"
        f" {results['memory_bytes_per_second'] / 1e9:.0f} GB/s.\n\n{as_table(lines)}\n\n"
        f"{as_table(loading_lines(results))}\n"
    )


def loading_lines(results: dict) -> list[list[str]]:
    """A line for each way to load, compared with the first of its kind."""
    lines = [["", "options", "images/s (range)", "times"]]
    for row in results["loading"]:
        found = rates(row, row["images"])
        first = next(iter(found.values()))[1]
        for name, (low, middle, high) in found.items():
            rate = f"{middle:.0f} ({low:.0f} to {high:.0f})"
            lines.append([row["what"], name, rate, f"{middle / first:.2f}"])
    return lines


def drawn(results: dict) -> Figure:
    """Images a second of both sides, and the lower limit, one panel for each pass."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, what in zip(panels, ("step", "evaluation"), strict=True):
        chosen = [row for row in reversed(results["rows"]) if row["what"] == what]
        for place, row in enumerate(chosen):
            bound = min(limits(row, results).values())
            for side, height, colour in (("composed", 0.2, "tab:gray"), ("ours", -0.2, "tab:blue")):
                low, middle, high = rates(row, row["batch"])[side]
                label = side if place == 0 else None
                spread = [[middle - low], [high - middle]]
                axes.barh(place + height, middle, 0.36, xerr=spread, color=colour, label=label)
            label = "limit" if place == 0 else None
            axes.plot([bound, bound], [place - 0.4, place + 0.4], "r:", label=label)
        names = [f"{row['case']}, batch {row['batch']}" for row in chosen]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(title=what, xlabel="images/s", xlim=(0, None))
        axes.legend(fontsize=8)
    figure.suptitle(f"{results['network']}, {results['machine']}, {results['date']}", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
