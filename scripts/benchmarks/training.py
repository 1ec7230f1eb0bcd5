"""What the code costs: both sides in turn in one process, medians of interleaved rounds.

    python scripts/benchmark.py measures       a training step with and without the live measures
    python scripts/benchmark.py step           a training step against another
    python scripts/benchmark.py evaluation     a forward pass against another
    python scripts/benchmark.py loader         loading one image against the released transforms
    python scripts/benchmark.py workers        loading batches with 0, 1, 2, ... workers
    python scripts/benchmark.py speed          all of these and their options: a page of results
    python scripts/benchmark.py inference      engines with and without bits: a page of results

Of a step and an evaluation, one side takes --precision, --compile and --channels_last; the other is
float32, eager and NCHW: with --against composed (the default) composed from elementary operations
(tests/composed.py), with --against eager our own code.  Products of float32 use TF32 on both sides
if the precision is not float32.  `step --split` tells how long teacher, forward, backward and
optimizer take, one after the other.

`loader` and `workers` read JPEGs of about ImageNet's size, made here; with `--decoder pil
nvimagecodec --resize pil torch` all four combinations take turns.
"""

import argparse
import atexit
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate
from torchvision.datasets.folder import pil_loader

from models import build_model
from tests import composed
from utils.run.command_line import Parser, command
from utils.run.config import RESIZES, Config, parse_config
from utils.data import SeededDataset, open_train_images, train_loader
from utils.data.decode import DECODERS
from utils.run.distributed import DistEnv
from utils.engine import train_one_epoch
from utils.metrics import BinaryMetrics
from utils.losses import batch_loss
from utils.optim import build_optimizer
from utils.precision import PRECISIONS, autocast, compiled, place, set_precision
from utils.results import accelerator

Sides = dict[str, Callable[[], None]]
STEP2 = Path(__file__).resolve().parents[1] / "step2" / "config.yaml"
ALONE = DistEnv(0, 0, 1, torch.device("cpu"))
LOADED = 8  # images of a batch, in `loader` and `workers`


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--model", default="reactnet_a")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--against", choices=("composed", "eager"), default="composed")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--teacher", action="store_true", help="a torchvision ResNet-34, in `step`")
    parser.add_argument("--split", action="store_true", help="time the parts of `step`")
    parser.add_argument("--profile", type=Path, help="write our costliest operations to this file")
    parser.add_argument(
        "--decoder", choices=DECODERS, nargs="+", default=["pil"], help="those that are compared"
    )
    parser.add_argument(
        "--resize", choices=RESIZES, nargs="+", default=["pil"], help="those that are compared"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers that are compared"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file as well")
    return parser.parse_args()


@command
def main() -> None:
    if sys.argv[1:2] in (["inference"], ["speed"]):
        program = Path(__file__).with_name(f"benchmark_{sys.argv[1]}.py")
        os.execv(sys.executable, [sys.executable, str(program), *sys.argv[2:]])
    arguments = parse()
    sides, notes = BENCHMARKS[arguments.what](arguments)
    seconds = interleaved(sides, arguments.rounds)
    report(seconds, notes, arguments)


def device_of_this_machine() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(arguments: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size, device=device)
    return images, torch.arange(arguments.batch_size, device=device)


def step_with_and_without_measures(arguments: argparse.Namespace) -> tuple[Sides, dict]:
    device = device_of_this_machine()
    torch.manual_seed(0)
    model = build_model(arguments.model).to(device)
    batch = random_batch(arguments, device)
    optimizer = build_optimizer(model, 1e-3, 0.0)
    live = BinaryMetrics(model, batch[0][:1])

    def step(after_step: Callable[[], None] | None) -> Callable[[], None]:
        return lambda: train_one_epoch(
            model, None, [batch], optimizer, device, after_step=after_step
        )

    return {"without": step(None), "with": step(live.after_step)}, {}


class Side:
    """A network, its teacher and its optimizer, as one side of a comparison.

    Args:
        name: "ours", with all options; "eager", the same code without any; or "composed".
    """

    def __init__(self, arguments: argparse.Namespace, name: str):
        torch.manual_seed(0)
        self.device = device_of_this_machine()
        self.precision = arguments.precision if name == "ours" else "float32"
        channels_last = arguments.channels_last and name == "ours"
        compiles = arguments.compile and name == "ours"
        model = build_model(arguments.model, latent_init="symmetric")
        if name == "composed":
            model = composed.composed(model)
        place(model, self.device, channels_last)
        options = {"fused": False} if name == "composed" else None
        self.optimizer = build_optimizer(model, 1e-3, 0.0, options=options)
        self.model = compiled(model, compiles)
        self.teacher = None
        if arguments.teacher:
            teacher = torchvision.models.resnet34().eval().requires_grad_(False)
            self.teacher = compiled(place(teacher, self.device, channels_last), compiles)
        self.batch = random_batch(arguments, self.device)

    def step(self) -> None:
        train_one_epoch(
            self.model,
            self.teacher,
            [self.batch],
            self.optimizer,
            self.device,
            precision=self.precision,
        )
        wait_for(self.device)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        with autocast(self.device, self.precision):
            self.model(self.batch[0])
        wait_for(self.device)

    def saved_bytes(self) -> float:
        """MiB per image that a forward pass keeps for the backward pass, parameters apart."""
        own = {parameter.data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
            return tensor

        held: list[Tensor] = []  # so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.model.train()
            with autocast(self.device, self.precision):
                self.model(self.batch[0])
        return sum(kept.values()) / len(self.batch[0]) / 2**20

    def split(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        times = {}

        def timed(name: str, run: Callable):
            wait_for(self.device)
            started = time.perf_counter()
            result = run()
            wait_for(self.device)
            times[name] = time.perf_counter() - started
            return result

        images, labels = self.batch
        self.model.train()
        with autocast(self.device, self.precision):
            if self.teacher is not None:
                with torch.no_grad():
                    timed("teacher", lambda: self.teacher(images))
            logits = timed("forward", lambda: self.model(images))
            loss = batch_loss(logits, images, labels, None, 0.0)
        timed("backward", loss.backward)
        timed("optimizer", self.optimizer.step)
        return times


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired(arguments: argparse.Namespace, run: Callable) -> tuple[Sides, dict]:
    set_precision(arguments.precision)
    sides = {name: Side(arguments, name) for name in (arguments.against, "ours")}
    notes = {}
    if run is Side.step:
        kept = {name: side.saved_bytes() for name, side in sides.items()}
        notes["saved for backward, MiB/image"] = kept
    if sides["ours"].device.type == "cuda":
        notes["peak memory, MiB"] = {name: peak_memory(side, run) for name, side in sides.items()}
    if arguments.profile:
        arguments.profile.write_text(costliest_operations(sides["ours"], run))
    if arguments.split:
        notes |= seconds_of_parts(sides, arguments.rounds)
    return {name: lambda side=side: run(side) for name, side in sides.items()}, notes


def seconds_of_parts(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, float]]:
    """Of each part of a step, the median of every side, after two rounds to warm up and compile."""
    splits = [{name: side.split() for name, side in sides.items()} for _ in range(2 + rounds)][2:]
    return {
        f"{part}, s": {name: statistics.median(one[name][part] for one in splits) for name in sides}
        for part in splits[0]["ours"]
    }


def costliest_operations(side: Side, run: Callable) -> str:
    """The 20 operations that one warm pass spends most time in, as a table."""
    activities = [ProfilerActivity.CPU]
    if side.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):
        run(side)
    with profile(activities=activities) as told:
        run(side)
    where = f"self_{side.device.type}_time_total"
    return told.key_averages().table(sort_by=where, row_limit=20, max_name_column_width=80)


def peak_memory(side: Side, run: Callable) -> float:
    run(side)
    torch.cuda.reset_peak_memory_stats()
    run(side)
    return torch.cuda.max_memory_allocated() / 2**20


def step(arguments: argparse.Namespace) -> tuple[Sides, dict]:
    return paired(arguments, Side.step)


def evaluation(arguments: argparse.Namespace) -> tuple[Sides, dict]:
    return paired(arguments, Side.evaluate)


def loader_against_composed(arguments: argparse.Namespace) -> tuple[Sides, dict]:
    """What one worker does, batch after batch."""
    folder, notes = folder_of_jpegs(arguments.batch_size)
    sides = {}
    for config in loader_configs(arguments, folder):
        images = open_train_images(config, ALONE)
        if not sides:
            released = composed.train_transform(config.image_size, config.crop_scale)
            sides["composed"] = loading(images.images.samples, pil_loader, released)
        name = f"decoder {config.decoder}, resize {config.resize}"
        sides[name] = loading(images.images.samples, images.images.loader, images.transform)
    return sides, notes


def loading(samples: list[tuple[str, int]], read: Callable, transform: Callable):
    def run() -> None:
        torch.manual_seed(0)  # the same crops on all sides
        for start in range(0, len(samples), LOADED):
            default_collate([transform(read(path)) for path, _ in samples[start : start + LOADED]])

    return run


def loader_with_workers(arguments: argparse.Namespace) -> tuple[Sides, dict]:
    """The loader of a training run, for an epoch of `batch_size` images."""
    folder, notes = folder_of_jpegs(arguments.batch_size)
    sides = {}
    for config in loader_configs(arguments, folder):
        images = open_train_images(config, ALONE)
        for workers in arguments.workers:
            name = f"decoder {config.decoder}, resize {config.resize}, workers {workers}"
            sides[name] = an_epoch(images, replace(config, workers=workers, batch_size=LOADED))
    return sides, notes


def an_epoch(images: SeededDataset, config: Config) -> Callable[[], None]:
    batches = train_loader(images, config, ALONE)

    def run() -> None:
        for _ in batches:
            pass

    return run


def loader_configs(arguments: argparse.Namespace, folder: Path) -> Iterator[Config]:
    config = parse_config(STEP2, ["--image_size", str(arguments.image_size), "--data", str(folder)])
    for decoder, resize in itertools.product(arguments.decoder, arguments.resize):
        yield replace(config, decoder=decoder, resize=resize)


def folder_of_jpegs(count: int) -> tuple[Path, dict]:
    """A temporary data folder with one class, and the size of its files."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    images = folder / "train" / "clouds"
    images.mkdir(parents=True)
    for seed in range(count):
        write_imagenet_sized_jpeg(images / f"{seed:04}.jpg", seed)
    mean = sum(path.stat().st_size for path in images.iterdir()) / count / 1e3
    return folder, {"mean file, KB": {"all": mean}}


def write_imagenet_sized_jpeg(path: Path, seed: int) -> None:
    """500 x 375 pixels of clouds and grain, around 100 KB as ImageNet's files are."""
    random = np.random.default_rng(seed)
    clouds = Image.fromarray(random.integers(0, 255, (47, 63, 3), dtype=np.uint8))
    pixels = np.array(clouds.resize((500, 375), Image.Resampling.BICUBIC))
    pixels = pixels + random.normal(0, 9, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=92)


def interleaved(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after two rounds to warm up and compile."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(-2, rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(
    seconds: dict[str, list[float]], notes: dict[str, dict], arguments: argparse.Namespace
) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first, *others = medians
    ratios = {name: medians[first] / medians[name] for name in others}
    for name, values in seconds.items():
        rate = arguments.batch_size / medians[name]
        print(
            f"{name:{max(map(len, seconds))}} median {medians[name]:.3f} s, {rate:.1f} images/s,"
            f" {min(values):.3f} to {max(values):.3f} s in {len(values)} rounds"
        )
    for note, values in notes.items():
        print(f"{note}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    if arguments.what == "measures":
        print(f"overhead {100 * (1 / ratios['with'] - 1):+.2f} %")
    else:
        for name, ratio in ratios.items():
            print(f"{name}: {ratio:.2f} times as fast as {first}")
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        settings |= {"torch": torch.__version__, "device": accelerator()}
        settings |= {"threads": torch.get_num_threads()}
        content = {"settings": settings, "seconds": seconds, "notes": notes}
        content["times as fast"] = ratios
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


BENCHMARKS = {
    "measures": step_with_and_without_measures,
    "step": step,
    "evaluation": evaluation,
    "loader": loader_against_composed,
    "workers": loader_with_workers,
}


if __name__ == "__main__":
    main()
