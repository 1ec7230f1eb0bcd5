"""What an option costs: both sides in turn in one process, medians of interleaved rounds.

    python scripts/benchmark.py measures [--model reactnet_a] [--image_size 224] [--batch_size 8]

measures    a training step with and without the live measures of signs
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models import build_model
from utils.command_line import Parser, command
from utils.engine import train_one_epoch
from utils.live import LiveMeasures
from utils.optim import build_optimizer


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("measures",))
    parser.add_argument("--model", default="reactnet_a")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    sides = step_with_and_without_measures(arguments)
    seconds = interleaved(sides, arguments.rounds)
    report(seconds, arguments)


def step_with_and_without_measures(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(arguments.model).to(device)
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size)
    batch = [(images, torch.arange(arguments.batch_size))]
    optimizer = build_optimizer(model, 1e-3, 0.0)
    live = LiveMeasures(model, images[:1].to(device))

    def step(after_step: Callable[[], None] | None) -> Callable[[], None]:
        return lambda: train_one_epoch(model, None, batch, optimizer, device, after_step=after_step)

    return {"without": step(None), "with": step(live.after_step)}


def interleaved(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one round to warm up; results are waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["with"] / medians["without"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    if arguments.json:
        settings = vars(arguments) | {"torch": torch.__version__, "device": device}
        print(json.dumps({"settings": settings, "seconds": seconds, "ratio": ratio}))
        return
    for name, values in seconds.items():
        print(
            f"{name:8} median {medians[name]:.3f} s,"
            f" {min(values):.3f} to {max(values):.3f} s in {len(values)} rounds"
        )
    print(f"overhead {100 * (ratio - 1):+.2f} %")


if __name__ == "__main__":
    main()
