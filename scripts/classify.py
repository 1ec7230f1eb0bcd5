"""Classify images: the five classes of the highest softmax, and the milliseconds it took.

    python scripts/classify.py FILE IMAGE... [--classes DIR]

FILE is a checkpoint of any layout, a packed file, an ONNX or an OpenVINO network.  Classes are
called as the folders in DIR, laid out like a data set's train/; without --classes, the 1000 of an
ImageNet network have their names, and those of another network are numbers.  The time is that of
the network for one image, after a first one of zeros, which also prepares the engine.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torchvision.models import ResNet34_Weights

from models.export import open_network
from utils.data.decode import whole_image
from utils.data.image_folder import class_names_of_network
from utils.data.transforms import ValTransform, normalize_batch
from utils.engine import count_outputs
from utils.run.command_line import Parser, add_network_options, command


@command
@torch.no_grad()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint, .safetensors, .onnx or .xml")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="one folder for each class")
    add_network_options(parser)
    arguments = parser.parse_args()
    network = open_network(
        arguments.file, binary_weights=arguments.binary_weights, small_images=arguments.small_images
    )
    transform = ValTransform(network)
    outputs = count_outputs(network.model, network.image_size, torch.device("cpu"))
    names = ResNet34_Weights.DEFAULT.meta["categories"]  # ImageNet's
    if arguments.classes:
        names = class_names_of_network(arguments.classes, outputs)
    elif outputs != len(names):
        names = [f"class {i}" for i in range(outputs)]
    for path in arguments.images:
        pixels, shift = transform(whole_image(path))
        image = normalize_batch(pixels[None], shift[None])
        started = time.perf_counter()
        logits = network.model(image)
        print(f"{path}: {1000 * (time.perf_counter() - started):.1f} ms")
        probabilities, classes = logits[0].softmax(0).topk(min(5, len(names)))
        for probability, index in zip(probabilities.tolist(), classes.tolist(), strict=True):
            print(f"  {100 * probability:6.2f} %  {names[index]}")


if __name__ == "__main__":
    main()
