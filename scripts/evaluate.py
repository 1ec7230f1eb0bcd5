"""Evaluate a checkpoint, packed file, ONNX or OpenVINO network, each image counted once.

    python scripts/evaluate.py FILE --data /path/to/imagenet
    python scripts/evaluate.py FILE --data ... --against OTHER     (same predictions?)
    python utils/launch.py scripts/evaluate.py FILE --data ...    (one process per GPU)
    python scripts/evaluate.py FILE --data PART --classes /path/to/imagenet/train

With --classes the data may have only some of the network's classes, matched by name; the logits of
the others are left out.  The last line is for a report.
A file written here brings its image size; others are evaluated at 224 pixels after 256.
In float32, roundings flip a few Signs whose inputs are near-ties, so two forms of one network may
differ on an image in a thousand; with --precision float64 they do not.  Fastest is --precision
bfloat16 --compile --channels_last, whose images/s include the time that compiling takes.
"""

import argparse
import functools
import json
import math
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from tqdm import tqdm

from models.checkpoints import LoadedNetwork
from models.export import open_network
from models.export.exported import ExportedNetwork
from utils import engine
from utils.checkpoint.checkpoint import write_released
from utils.checkpoint.files import check_output, sha256
from utils.data.dataset import open_val_images
from utils.data.image_folder import class_names_of_network
from utils.data.loader import PrefetchLoader, val_loader
from utils.losses import at_least_float32
from utils.precision import PRECISIONS, autocast, compiled, place, set_precision
from utils.run.command_line import Parser, add_network_options, command
from utils.run.config import Config, parse_config
from utils.run.device import DEVICES
from utils.run.distributed import DistEnv, all_reduce_sum, init_distributed
from utils.run.errors import UserError

Z95 = 1.959964  # of a two-sided 95 % interval
DEFAULTS = Path(__file__).resolve().parents[1] / "step2" / "config.yaml"
DATA_OPTIONS = ("data", "val_dir", "val_per_class", "cache_dir", "image_size", "val_resize")
DATA_OPTIONS += ("batch_size", "workers")
Network = LoadedNetwork | ExportedNetwork


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint, .safetensors, .onnx or .xml")
    for name in DATA_OPTIONS:
        parser.add_argument(f"--{name}", metavar="X", help="as in training")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="a folder for each class")
    add_network_options(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as in training")
    parser.add_argument("--precision", choices=(*PRECISIONS, "float64"), default="float32")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--channels_last", action="store_true", help="memory layout")
    parser.add_argument("--against", type=Path, help="another form, compared image by image")
    parser.add_argument("--expect", type=float, help="fail unless top-1's interval contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save_released", type=Path, help="write the file in the released layout")
    parser.add_argument("--force", action="store_true", help="let --save_released replace a file")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    if arguments.save_released:
        check_output(arguments.save_released, arguments.force)
    with init_distributed(arguments.device) as dist:
        set_precision(arguments.precision)
        network = open_on_device(arguments.file, arguments, dist)
        asked = arguments.compile, arguments.channels_last, arguments.save_released
        is_exported = isinstance(network, ExportedNetwork)
        if is_exported and (arguments.precision != "float32" or any(asked)):
            raise UserError(
                f"{network} computes in float32 on an engine of its own: leave --precision,"
                " --compile, --channels_last and --save_released out"
            )
        config = data_config(arguments, network)
        loader = val_loader(open_val_images(config), config, dist)
        model = model_for(network, loader, arguments)
        results = evaluate(model, loader, arguments.precision, dist)
        if arguments.against:
            other = model_for(open_on_device(arguments.against, arguments, dist), loader, arguments)
            results |= compare(model, other, loader, arguments.precision)
    if not dist.is_rank0:
        return
    report(results, str(network), arguments)
    if arguments.save_released:
        write_released(network.checkpoint, arguments.save_released)
    low, high = results["top1_interval"]
    expected = arguments.expect
    if expected is not None and not low <= expected <= high:
        raise UserError(f"expected top-1 {expected} % is outside of {low:.2f} to {high:.2f} %")


def open_on_device(file: Path, arguments: argparse.Namespace, dist: DistEnv) -> Network:
    """The network in a file, on the device; a checkpoint's laid out and in float64 as asked."""
    network = open_network(
        file, binary_weights=arguments.binary_weights, small_images=arguments.small_images
    )
    model = place(network.model, arguments, dist.device)
    if arguments.precision == "float64" and not isinstance(network, ExportedNetwork):
        model.double().register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    return network


def data_config(arguments: argparse.Namespace, network: Network) -> Config:
    """Step 2's defaults, over them the network's sizes, over all the options."""
    options = {"image_size": network.image_size, "val_resize": network.val_resize}
    given = {name: getattr(arguments, name) for name in DATA_OPTIONS}
    options |= {name: value for name, value in given.items() if value is not None}
    return parse_config(DEFAULTS, [f"--{name}={value}" for name, value in options.items()])


def model_for(network: Network, loader: PrefetchLoader, arguments: argparse.Namespace) -> nn.Module:
    """The model of a network, with logits for the data's classes alone, compiled if asked.

    Raises:
        UserError: network and data have other classes.
    """
    model, classes = network.model, loader.dataset.classes
    outputs = engine.count_outputs(model, network.image_size, loader.device)
    if arguments.classes:
        names = class_names_of_network(arguments.classes, outputs)
        if unknown := [name for name in classes if name not in names]:
            raise UserError(
                f"{len(unknown)} of the data's {len(classes)} classes are none of the network's,"
                f" which {arguments.classes} names: {', '.join(unknown[:3])}"
            )
        columns = [names.index(name) for name in classes]
        model.register_forward_hook(lambda module, inputs, logits: logits[:, columns])
    elif outputs != len(classes):
        raise UserError(
            f"the network has {outputs} classes and the data {len(classes)}:"
            " evaluate on the data it was trained for, or match the classes by name with --classes"
            " and the train/ folder of that data"
        )
    return model if isinstance(network, ExportedNetwork) else compiled(model, arguments)


def evaluate(model: nn.Module, loader: PrefetchLoader, precision: str, dist: DistEnv) -> dict:
    """top1, top5 (percent) and loss with their intervals, images, images_per_second."""
    # A bar on rank 0's terminal, none where the output is not a terminal.
    progress = functools.partial(tqdm, leave=False, disable=None if dist.is_rank0 else True)
    meter = engine.evaluate(model, loader, precision, progress)
    results = meter.results()
    if results["images"] != len(loader.dataset):
        raise RuntimeError(f"counted {results['images']} of {len(loader.dataset)} images")
    return results | intervals(results, meter.loss_deviation())


@torch.no_grad()
def compare(model: nn.Module, other: nn.Module, loader: PrefetchLoader, precision: str) -> dict:
    """same_class: images of which both predict the same class; logit_difference: mean |a - b|."""
    sums = torch.zeros(3, dtype=torch.float64, device=loader.device)
    for images, _ in loader:
        with autocast(loader.device, precision):
            ours, theirs = (at_least_float32(network(images)) for network in (model, other))
        sums[0] += (ours.argmax(1) == theirs.argmax(1)).sum()
        sums[1] += (ours - theirs).abs().sum()
        sums[2] += ours.numel()
    same, difference, count = all_reduce_sum(sums).tolist()
    return {"same_class": int(same), "logit_difference": difference / count}


def intervals(results: dict, loss_deviation: float) -> dict[str, list[float]]:
    """95 % intervals: Wilson's for the accuracies, the normal one for the mean loss."""
    n = results["images"]
    half = Z95 * loss_deviation / math.sqrt(n)
    bounds = {"loss_interval": [results["loss"] - half, results["loss"] + half]}
    for name in ("top1", "top5"):
        p = results[name] / 100
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        bounds[f"{name}_interval"] = [100 * (centre - half), 100 * (centre + half)]
    return bounds


def report(results: dict, network: str, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"network": network, "torch": torch.__version__} | results))
        return
    print(network)
    for name, digits, unit in (("top1", 2, " %"), ("top5", 2, " %"), ("loss", 4, "")):
        values = (results[name], *results[f"{name}_interval"])
        value, low, high = (f"{value:.{digits}f}" for value in values)
        print(f"{name} {value}{unit} (95 % interval {low} to {high})")
    if "same_class" in results:
        print(
            f"same class for {results['same_class']} of {results['images']} images,"
            f" mean difference of a logit {results['logit_difference']:.1e}"
        )
    print(f"{results['images']} images, {results['images_per_second']:.0f} images/s")
    print(
        f"report: sha256 {sha256(arguments.file)}, top-1 {results['top1']:.2f} %,"
        f" {results['images']} images, {shlex.join(['python', *sys.argv])}"
    )


if __name__ == "__main__":
    main()
