"""Accuracy of a checkpoint, packed file, ONNX or OpenVINO network, each image counted once.

    python scripts/evaluate.py FILE --data /path/to/imagenet
    python scripts/evaluate.py FILE --data ... --against OTHER     (do both tell the same classes?)
    python utils/launch.py scripts/evaluate.py FILE --data ...    (one process per GPU)

A file written here brings its image size; others are taken for 224 pixels after 256.
In float32, roundings flip a few Signs whose inputs are near-ties, so two forms of one network may
differ on an image in a thousand; with --precision float64 they do not.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from models.export.exported import ExportedNetwork
from models.checkpoints import LoadedNetwork, open_network
from utils.checkpoint.checkpoint import write_released
from utils.run.command_line import Parser, add_network_options, command
from utils.run.config import Config, parse_config
from utils.data import open_val_images, val_loader
from utils.run.distributed import DistEnv, all_reduce_sum, init_distributed
from utils.engine import Meter, count_outputs, measure
from utils.run.errors import UserError
from utils.checkpoint.files import check_output

Z95 = 1.959964  # of a two-sided 95 % interval
DEFAULTS = Path(__file__).resolve().parents[1] / "step2" / "config.yaml"
DATA_OPTIONS = ("data", "val_dir", "cache_dir", "image_size", "val_resize", "batch_size", "workers")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint, .safetensors, .onnx or .xml")
    for name in DATA_OPTIONS:
        parser.add_argument(f"--{name}", metavar="X", help="as in training")
    add_network_options(parser)
    parser.add_argument("--precision", choices=("float32", "float64"), default="float32")
    parser.add_argument("--against", type=Path, help="another form, compared image by image")
    parser.add_argument("--expect", type=float, help="fail unless top-1's interval holds this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save_released", type=Path, help="write the file in the released layout")
    parser.add_argument("--force", action="store_true", help="replace what --save_released finds")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    if arguments.save_released:
        check_output(arguments.save_released, arguments.force)
    with init_distributed() as process:
        network = opened(arguments.file, arguments)
        config = data_config(arguments, network)
        model = answering(network, arguments.precision, process)
        results = evaluate(model, config, process)
        if arguments.against:
            other = open_either(arguments.against, arguments)
            results |= compare(
                model, answering(other, arguments.precision, process), config, process
            )
    if not process.is_rank0:
        return
    report(results, str(network), arguments.json)
    if arguments.save_released:
        write_released(network.checkpoint, arguments.save_released)
    if arguments.expect is not None:
        low, high = results["top1_interval"]
        if not low <= arguments.expect <= high:
            raise UserError(
                f"expected top-1 {arguments.expect} % is outside of {low:.2f} to {high:.2f} %"
            )


def open_either(file: Path, arguments: argparse.Namespace) -> LoadedNetwork | ExportedNetwork:
    return open_network(
        file,
        binary_weights=arguments.binary_weights,
        small_images=arguments.small_images,
    )


def opened(file: Path, arguments: argparse.Namespace) -> LoadedNetwork | ExportedNetwork:
    """What is evaluated; refuses options that it could not follow."""
    network = open_either(file, arguments)
    if isinstance(network, ExportedNetwork):
        if arguments.precision == "float64":
            raise UserError(f"{file} computes in float32: leave --precision out")
        if arguments.save_released:
            raise UserError(f"{file} is no checkpoint: --save_released needs one")
    return network


def data_config(arguments: argparse.Namespace, network: LoadedNetwork | ExportedNetwork) -> Config:
    """Step 2's defaults, over them the sizes that the network brings, over all the options."""
    given = {name: getattr(arguments, name) for name in DATA_OPTIONS}
    options = [text for k, v in given.items() if v is not None for text in (f"--{k}", v)]
    config = parse_config(DEFAULTS, options)
    own = {name: getattr(network, name) for name in ("image_size", "val_resize")}
    return dataclasses.replace(config, **{k: v for k, v in own.items() if given[k] is None})


class InFloat64(nn.Module):
    """`model` in float64, its parameters as they are: roundings too small to flip a Sign."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.double())


def answering(
    network: LoadedNetwork | ExportedNetwork, precision: str, dist: DistEnv
) -> nn.Module:
    """The network on the device, in eval mode, and in float64 if asked and if it can."""
    in_float64 = precision == "float64" and not isinstance(network, ExportedNetwork)
    model = InFloat64(network.model) if in_float64 else network.model
    return model.to(process.device).eval()


def evaluate(model: nn.Module, config: Config, dist: DistEnv) -> dict:
    """top1, top5 (percent) and loss with their intervals, images, images_per_second."""
    images = open_val_images(config, process)
    classes = count_outputs(model, config.image_size, process.device)
    if classes != len(images.classes):
        raise UserError(
            f"the network has {classes} classes and the data {len(images.classes)}:"
            " evaluate on the data it was trained for"
        )
    meter = measure(model, val_loader(images, config, process), process.device)
    results = meter.results()
    if results["images"] != len(images):
        raise RuntimeError(f"counted {results['images']} of {len(images)} images")
    return results | intervals(meter)


@torch.no_grad()
def compare(model: nn.Module, other: nn.Module, config: Config, dist: DistEnv) -> dict:
    """same_class: images on which both networks predict alike; logit_difference: the mean one."""
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)
    for images, _ in val_loader(open_val_images(config, process), config, process):
        ours, theirs = model(images), other(images)
        if ours.shape != theirs.shape:
            raise UserError(f"one network has {ours.shape[1]} classes, one {theirs.shape[1]}")
        sums[0] += (ours.argmax(1) == theirs.argmax(1)).sum()
        sums[1] += (ours - theirs).abs().sum()
        sums[2] += ours.numel()
    same, difference, count = all_reduce_sum(sums).tolist()
    return {"same_class": int(same), "logit_difference": difference / count}


def intervals(meter: Meter) -> dict[str, list[float]]:
    """95 % intervals: Wilson's for the accuracies, the normal one for the mean loss."""
    results = meter.results()
    n = results["images"]
    half = Z95 * meter.loss_deviation() / math.sqrt(n)
    bounds = {"loss_interval": [results["loss"] - half, results["loss"] + half]}
    for name in ("top1", "top5"):
        p = results[name] / 100
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        bounds[f"{name}_interval"] = [100 * (centre - half), 100 * (centre + half)]
    return bounds


def report(results: dict, what: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"network": what, "torch": torch.__version__} | results))
        return
    print(what)
    for name, unit in (("top1", " %"), ("top5", " %"), ("loss", "")):
        low, high = results[f"{name}_interval"]
        digits = 2 if unit else 4
        print(
            f"{name} {results[name]:.{digits}f}{unit}"
            f" (95 % interval {low:.{digits}f} to {high:.{digits}f})"
        )
    if "same_class" in results:
        print(
            f"same class for {results['same_class']} of {results['images']} images,"
            f" mean difference of a logit {results['logit_difference']:.1e}"
        )
    print(f"{results['images']} images, {results['images_per_second']:.0f} images/s")


if __name__ == "__main__":
    main()
