"""Convert a checkpoint for deployment; the answers stay those of the network, without retraining.

    python scripts/convert.py FILE --to exact    --output model.pth.tar
    python scripts/convert.py FILE --to packed   --output model.safetensors [--dtype float16]
    python scripts/convert.py FILE --to onnx     --output model.onnx [--batch 1] [--image_size 224]
    python scripts/convert.py FILE --to openvino --output model.xml [--batch 1] [--image_size 224]

exact     kernels of exactly -1 and +1, their scales folded into the following BN
packed    the same at 1 bit per binary weight, the other tensors in float32 or float16
onnx      weights as plain float32 convolutions, batch dynamic unless --batch fixes it
openvino  1 bit per binary weight and activation, computed with XNOR and popcount; model.xml is the
          graph, model.bin beside it the constants

FILE may be a checkpoint of any layout or a packed file, so `--to exact` also unpacks.  All of them
are for inference: latent weights and optimizer stay behind.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from models.export.fold import binary_convolutions, fold_scales
from models.checkpoints import LoadedNetwork, inference_content, load_network
from models.export.onnx import SUFFIX as ONNX_SUFFIX
from models.export.onnx import OnnxNetwork, write_onnx
from models.export.openvino import SUFFIX as OPENVINO_SUFFIX
from models.export.openvino import OpenVinoNetwork, constants_path, write_openvino
from utils.checkpoint.checkpoint import write_checkpoint
from utils.run.command_line import Parser, add_network_options, command, positive
from utils.run.errors import UserError
from utils.checkpoint.files import check_output
from utils.checkpoint.packed import SUFFIX as PACKED_SUFFIX
from utils.checkpoint.packed import write_packed

DTYPES = {"float32": torch.float32, "float16": torch.float16}
CHECKED_IMAGES = 16
ENGINES = {"onnx": (write_onnx, OnnxNetwork), "openvino": (write_openvino, OpenVinoNetwork)}


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of any layout, or .safetensors")
    parser.add_argument("--to", choices=("exact", "packed", *ENGINES), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="packed: other tensors")
    parser.add_argument("--batch", type=positive, help="onnx, openvino: fixed batch")
    parser.add_argument(
        "--image_size", type=positive, help="onnx, openvino: pixels; the training's by default"
    )
    add_network_options(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    files = written_files(arguments.to, arguments.output)
    for file in files:
        check_output(file, arguments.force)
    loaded = load_network(
        arguments.file,
        binary_weights=arguments.binary_weights,
        small_images=arguments.small_images,
    )
    print(loaded)
    image_size = arguments.image_size or loaded.image_size
    if arguments.to == "exact":
        to_exact(loaded, arguments.output, image_size)
    elif arguments.to == "packed":
        to_packed(loaded, arguments.output, image_size, DTYPES[arguments.dtype])
    else:
        to_engine(loaded, arguments.to, files, image_size, arguments.batch)
    size = sum(file.stat().st_size for file in files)
    names = " and ".join(map(str, files))
    print(f"wrote {names}: {size:,} bytes, from {arguments.file.stat().st_size:,}")


def written_files(form: str, output: Path) -> list[Path]:
    """All the files of a conversion.

    Raises:
        UserError: the form is read by its suffix, and `output` has another one.
    """
    suffix = {"packed": PACKED_SUFFIX, "onnx": ONNX_SUFFIX, "openvino": OPENVINO_SUFFIX}.get(form)
    if suffix and output.suffix != suffix:
        raise UserError(f"a file for --to {form} is named *{suffix}, not {output.name}")
    return [output, constants_path(output)] if form == "openvino" else [output]


def to_exact(loaded: LoadedNetwork, output: Path, image_size: int) -> None:
    check_folding(loaded.model, image_size)
    state = fold_scales(loaded.model).state_dict()
    write_checkpoint(output, {"state_dict": state, **inference_content(loaded)})
    check_written(loaded.model, load_network(output).model, [output], image_size)


def to_packed(loaded: LoadedNetwork, output: Path, image_size: int, dtype: torch.dtype) -> None:
    check_folding(loaded.model, image_size)
    model = fold_scales(loaded.model)
    binary = {f"{name}.weight" for name in binary_convolutions(model)}
    write_packed(output, model.state_dict(), binary, inference_content(loaded), dtype)
    check_written(loaded.model, load_network(output).model, [output], image_size)


def to_engine(
    loaded: LoadedNetwork, engine: str, files: list[Path], image_size: int, batch: int | None
) -> None:
    write, read = ENGINES[engine]
    resize = round(loaded.val_resize * image_size / loaded.image_size)
    write(loaded.model, files[0], image_size, batch, resize)
    check_written(loaded.model, read(files[0]), files, image_size)


def random_images(image_size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (CHECKED_IMAGES, 3, image_size, image_size)
    return torch.randn(shape, generator=generator, dtype=dtype)


@torch.no_grad()
def check_folding(model: nn.Module, image_size: int) -> None:
    """Print how far folding moves a logit in float64, where no rounding flips a Sign."""
    images = random_images(image_size, torch.float64)
    exact_arithmetic = copy.deepcopy(model).double()
    difference = fold_scales(exact_arithmetic)(images) - exact_arithmetic(images)
    print(f"float64: logits of {len(images)} random images within {difference.abs().max():.1e}")


@torch.no_grad()
def check_written(model: nn.Module, written: nn.Module, files: list[Path], image_size: int) -> None:
    """Print how the written network answers beside the one it came from.

    Raises:
        UserError: it mostly predicts other classes; its files are removed.
    """
    images = random_images(image_size, torch.float32)
    expected, logits = model(images), written(images)
    agree = int((expected.argmax(1) == logits.argmax(1)).sum())
    print(
        f"as written: {agree} of {len(images)} predictions equal,"
        f" logits within {(expected - logits).abs().max():.1e}"
    )
    if agree < len(images) / 2:
        for file in files:
            file.unlink()
        raise UserError(f"{files[0]} answered differently and was removed: the engine is unsound")


if __name__ == "__main__":
    main()
