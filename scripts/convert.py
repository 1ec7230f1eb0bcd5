"""Convert a checkpoint for deployment; predictions stay those of the network, without retraining.

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
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models.checkpoints import LoadedNetwork, inference_content, load_network
from models.export import onnx, open_network, openvino
from models.export.fold import fold_scales
from utils.binarize import binary_convolutions
from utils.checkpoint import packed
from utils.checkpoint.checkpoint import write_checkpoint
from utils.checkpoint.files import check_output
from utils.run.command_line import Parser, add_network_options, command, positive
from utils.run.errors import UserError

SUFFIXES = {"packed": packed.SUFFIX, "onnx": onnx.SUFFIX, "openvino": openvino.SUFFIX}
WRITERS = {"onnx": onnx.write_onnx, "openvino": openvino.write_openvino}
WRITTEN_TOLERANCE = 1e-2  # of the logits' standard deviation, for the median image


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of any layout, or .safetensors")
    parser.add_argument("--to", choices=("exact", "packed", *WRITERS), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="packed: of the rest")
    parser.add_argument("--batch", type=positive, help="onnx, openvino: fixed batch")
    parser.add_argument("--image_size", type=positive, help="onnx, openvino: not as in training")
    add_network_options(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    output = arguments.output
    forms = {suffix: form for form, suffix in SUFFIXES.items()}
    if forms.get(output.suffix, "exact") != arguments.to:
        suffix = SUFFIXES.get(arguments.to, ".pth.tar")
        raise UserError(f"a file for --to {arguments.to} is named *{suffix}, not {output.name}")
    for option in ("dtype", "batch", "image_size"):
        if getattr(arguments, option) and (option == "dtype") != (arguments.to == "packed"):
            raise UserError(f"--{option} is not for --to {arguments.to}: leave it out")
    files = [output, openvino.constants_path(output)] if arguments.to == "openvino" else [output]
    for file in files:
        check_output(file, arguments.force)
    loaded = load_network(
        arguments.file, binary_weights=arguments.binary_weights, small_images=arguments.small_images
    )
    print(loaded)
    try:
        # What is there already is replaced by what has been checked.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            write_checked(loaded, arguments, Path(folder) / output.name)
            for file in reversed(files):  # the graph last, which names its constants
                (Path(folder) / file.name).replace(file)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    size = sum(file.stat().st_size for file in files)
    names = " and ".join(map(str, files))
    print(f"wrote {names}: {size:,} bytes, from {arguments.file.stat().st_size:,}")


def write_checked(loaded: LoadedNetwork, arguments: argparse.Namespace, output: Path) -> None:
    """Write a network in the form asked for, and check what it predicts."""
    image_size = arguments.image_size or loaded.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, image_size, image_size, generator=generator)
    if write := WRITERS.get(arguments.to):
        resize = round(loaded.val_resize * image_size / loaded.image_size)
        write(loaded.model, output, image_size, arguments.batch, resize)
        check_written(loaded.model, images, output)
        return
    # Without rounding first: that shows whether the scales went where they belong.
    for dtype in dict.fromkeys(("float32", arguments.dtype or "float32")):
        write_folded(loaded, arguments.to, output, getattr(torch, dtype))
        check_written(loaded.model, images, output, rounded=dtype == "float16")


def write_folded(loaded: LoadedNetwork, form: str, output: Path, dtype: torch.dtype) -> None:
    """Write a network with weights of exactly -1 and +1, as `exact` or `packed`."""
    model, content = fold_scales(loaded.model), inference_content(loaded)
    if form == "exact":
        write_checkpoint(output, {"state_dict": model.state_dict(), **content})
    else:
        binary = {f"{name}.weight" for name in binary_convolutions(model)}
        packed.write_packed(output, model.state_dict(), binary, content, dtype)


@torch.no_grad()
def check_written(model: nn.Module, images: Tensor, path: Path, rounded: bool = False) -> None:
    """Print whether the written network predicts as the one it came from.

    Of a network whose parameters were `rounded`, only the predicted classes are compared.

    Raises:
        UserError: it does not.
    """
    expected, logits = model(images), open_network(path).model(images)
    equal = int((expected.argmax(1) == logits.argmax(1)).sum())
    difference = (expected - logits).abs().amax(1)  # (N,)
    largest, typical = difference.max(), difference.median()
    print(f"as written: {equal} of {len(images)} predictions equal, logits within {largest:.1e}")
    # In float32 a near-tie of Sign moves all logits of its image, but most images have none.
    same_logits = rounded or typical <= WRITTEN_TOLERANCE * expected.std()
    if equal < len(images) / 2 or not same_logits:
        raise UserError(
            f"{path.name} predicts differently and is not kept: the engine is faulty, or"
            f" `scale_folds_into` of this {type(model).__name__} names wrong layers"
        )


if __name__ == "__main__":
    main()
