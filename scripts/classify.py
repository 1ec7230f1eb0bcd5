"""What a network sees in images: its five likeliest classes, and the milliseconds it took.

    python scripts/classify.py FILE IMAGE... [--classes DIR]

FILE is a checkpoint of any layout, a packed file, an ONNX or an OpenVINO network.  Classes are
called as the folders in DIR, laid out like a data set's train/; without --classes, the 1000 of an
ImageNet network have their names, and those of another network are numbers.  The time is that of
the network for one image after its first, which also prepares the engine.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.models import ResNet34_Weights

from models.checkpoints import open_network
from utils.run.command_line import Parser, add_network_options, command
from utils.data import ValTransform, normalize_batch
from utils.run.errors import UserError

LIKELIEST = 5


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint, .safetensors, .onnx or .xml")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="one folder for each class")
    add_network_options(parser)
    return parser.parse_args()


@command
@torch.no_grad()
def main() -> None:
    arguments = parse()
    network = open_network(
        arguments.file,
        binary_weights=arguments.binary_weights,
        small_images=arguments.small_images,
    )
    transform = ValTransform(network)
    batches = [default_collate([transform(decoded(path))]) for path in arguments.images]
    images = [normalize_batch(*batch) for batch in batches]  # (1, 3, S, S) each
    names = class_names(arguments.classes, network.model(images[0]).shape[1])
    for path, image in zip(arguments.images, images, strict=True):
        started = time.perf_counter()
        logits = network.model(image)
        milliseconds = 1000 * (time.perf_counter() - started)
        print(f"{path}: {milliseconds:.1f} ms")
        for name, share in likeliest(logits[0], names):
            print(f"  {100 * share:6.2f} %  {name}")


def decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises many types for a file it cannot decode
        raise UserError(f"cannot decode image {path} ({type(error).__name__})") from error


def class_names(folder: Path | None, count: int) -> list[str]:
    """A name for each of `count` classes, in the order of the network's outputs.

    Raises:
        UserError: `folder` does not have `count` folders.
    """
    if folder is None:
        imagenet = ResNet34_Weights.DEFAULT.meta["categories"]
        return imagenet if count == len(imagenet) else [f"class {i}" for i in range(count)]
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: pass one that holds a folder for each class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(names) != count:
        raise UserError(
            f"the network has {count} classes and {folder} {len(names)} folders:"
            " pass the train/ folder of the data it was trained on"
        )
    return names


def likeliest(logits: Tensor, names: list[str]) -> list[tuple[str, float]]:
    """The five classes of the highest softmax, with it: logits (classes,)."""
    shares, classes = logits.softmax(0).topk(min(LIKELIEST, len(names)))
    return [(names[i], share) for i, share in zip(classes.tolist(), shares.tolist(), strict=True)]


if __name__ == "__main__":
    main()
