"""How fast a binary network predicts: on engines with and without bits, and beside int8 networks.

    mkdir -p docs/results/inference
    python -m scripts.benchmarks.inference --output docs/results/inference [--file FILE]
    python -m scripts.benchmarks.inference --output docs/results/inference --redraw

Every contender runs in a process of its own.  In each round each one is measured once, in turn, so
that what else slows the machine slows them all; numbers are medians over rounds, with the lowest
and the highest.  Writes `results.json` and from it `table.md` and `latency.png`; --redraw makes
these two again.  Needs requirements-export.txt and requirements-openvino.txt.

Weights do not change the time: without --file they are random, and so are the int8 networks'.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from functools import cache, partial
from operator import call, itemgetter
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn

from models import MODELS, build_model
from models.checkpoints import load_network
from models.export.fold import to_plain_convs
from models.export.onnx import write_onnx
from models.export.openvino import load_engine, write_openvino
from models.export.openvino_selftest import PRECISION
from models.reference import to_reference
from scripts.benchmarks.page import add_output_options, table, write_page
from scripts.benchmarks.timing import fresh_process, interleaved, processor
from utils.run.command_line import Parser, command, positive

PUBLISHED = {  # top-1 on ImageNet
    "reactnet_a": 70.5,
    "reactnet_r18": 65.5,
    "bireal_r18": 56.4,
    "strong_baseline_r18": 63.2,
    "real_to_binary_r18": 65.4,
    "meliusnet29": 65.8,
    "bcdnet_a": 72.3,
}
INT8 = {"resnet18": 69.494, "mobilenet_v2": 71.658}  # torchvision's, of its int8 weights
COMPUTING = ("Convolution", "BinaryConvolution", "FullyConnected", "MatMul")
SHORTEST_SECONDS = 0.3  # of a measurement: as many calls as fill it, at least one


@command
def main() -> None:
    parser = Parser(__doc__)
    add_output_options(parser)
    parser.add_argument("--file", type=Path, help="checkpoint to measure, instead of --model")
    parser.add_argument("--model", choices=MODELS, default="reactnet_a")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=positive, default=7)
    write_page(parser.parse_args(), "latency.png", measure, as_markdown, draw)


def measure(arguments: argparse.Namespace) -> dict:
    engine = load_engine()
    if arguments.file:
        loaded = load_network(arguments.file, defaults={"binary_weights": True})
        model, name = loaded.model, loaded.name
    else:
        name = arguments.model
        model = build_model(name, width=arguments.width, latent_init="symmetric").eval()
    with tempfile.TemporaryDirectory() as folder:
        write_networks(model, Path(folder), arguments.image_size)
        rows = [
            row
            for threads in arguments.threads
            for row in measure_contenders(Path(folder), threads, arguments)
        ]
    return {
        "date": date.today().isoformat(),
        "machine": processor(),
        "versions": {"openvino": engine.__version__, "torch": torch.__version__},
        "network": name,
        "image_size": arguments.image_size,
        "rounds": arguments.rounds,
        "rows": [row | {"published": row["published"] or PUBLISHED[name]} for row in rows],
    }


def write_networks(model: nn.Module, folder: Path, image_size: int) -> None:
    """The files of the contenders, each for any batch."""
    torch.save(to_reference(model), folder / "reference.pth")
    torch.save(model, folder / "trained.pth")
    torch.save(to_plain_convs(model), folder / "plain.pth")
    write_onnx(model, folder / "network.onnx", image_size, None, image_size)
    write_openvino(model, folder / "network.xml", image_size, None, image_size)
    for name in INT8:
        real = folder / f"{name}.onnx"
        write_onnx(torchvision.models.get_model(name).eval(), real, image_size, None, image_size)
        write_int8(real, folder / f"{name}.int8.onnx", image_size)


def write_int8(source: Path, target: Path, image_size: int) -> None:
    """Quantize statically, per output channel, with the ranges that random images give."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class RandomImages(CalibrationDataReader):
        def __init__(self):
            images = np.random.default_rng(0).normal(size=(2, 3, image_size, image_size))
            self.batches = iter([{"images": images.astype(np.float32)}])

        def get_next(self):
            return next(self.batches, None)

    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(source, target, RandomImages(), per_channel=True, **types)


def measure_contenders(folder: Path, threads: int, arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each batch and contender."""
    with ExitStack() as stack:
        processes = {c: stack.enter_context(fresh_process(c.environment)) for c in CONTENDERS}

        def measure(contender: Contender, batch: int) -> tuple[float, dict[str, int]]:
            file = folder / contender.file
            network = contender.engine, file, threads, batch, arguments.image_size
            return processes[contender].submit(median_seconds, *network).result()

        for batch in arguments.batches:
            sides = {contender: partial(measure, contender, batch) for contender in CONTENDERS}
            for contender, measurements in interleaved(sides, arguments.rounds, call).items():
                milliseconds = [1000 * seconds for seconds, _ in measurements]
                _, kernels = measurements[0]
                yield {
                    "name": contender.name,
                    "threads": threads,
                    "batch": batch,
                    "milliseconds": median(milliseconds),
                    "low": min(milliseconds),
                    "high": max(milliseconds),
                    "images_per_second": 1000 * batch / median(milliseconds),
                    "kernels": kernels,
                    "published": contender.published,
                }


# A call, and how many of its layers run with which of the engine's kernels.
Loaded = tuple[Callable[[], object], dict[str, int]]


def pytorch(file: Path, threads: int, images: Tensor) -> Loaded:
    torch.set_num_threads(threads)
    model = torch.load(file, weights_only=False)  # written by the process that started this one
    return lambda: model(images), {}


def onnxruntime(file: Path, threads: int, images: Tensor) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed), {}


def openvino(file: Path, threads: int, images: Tensor) -> Loaded:
    import openvino

    core = openvino.Core()
    network = core.read_model(file)
    network.reshape(list(images.shape))
    settings = PRECISION | {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = core.compile_model(network, "CPU", settings)
    request, pixels = compiled.create_infer_request(), images.numpy()
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(layer["layerType"].value, layer["primitiveType"].value) for layer in layers]
    kernels = Counter(f"{layer} {kernel}" for layer, kernel in kinds if layer in COMPUTING)
    return lambda: request.infer([pixels], share_inputs=True), dict(kernels)


@dataclass(frozen=True, eq=False)
class Contender:
    """What is measured: an engine, the file it computes, and the instructions it is limited to.

    OV_CPU_MAX_ISA limits OpenVINO's own kernels and ONEDNN_MAX_CPU_ISA those of the library in it;
    the kernels of binary convolutions ask the second one whether VPOPCNTDQ is there.
    """

    name: str
    engine: Callable[[Path, int, Tensor], Loaded]
    file: str
    environment: dict[str, str] = field(default_factory=dict)
    published: float | None = None


BASELINE = "onnxruntime, float32"  # what the table's ratios compare with
AVX512_BW = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2 = AVX512_BW | {"OV_CPU_MAX_ISA": "AVX2"}
CONTENDERS = (
    Contender("PyTorch, reference", pytorch, "reference.pth"),
    Contender("PyTorch, as trained here", pytorch, "trained.pth"),
    Contender("PyTorch, weights binarized once", pytorch, "plain.pth"),
    Contender(BASELINE, onnxruntime, "network.onnx"),
    Contender("OpenVINO, float32", openvino, "network.onnx"),
    Contender("OpenVINO, 1 bit", openvino, "network.xml"),
    Contender("OpenVINO, 1 bit, no VPOPCNTDQ", openvino, "network.xml", AVX512_BW),
    Contender("OpenVINO, 1 bit, held to AVX2", openvino, "network.xml", AVX2),
    *(
        Contender(f"OpenVINO, int8 {name}", openvino, f"{name}.int8.onnx", published=top1)
        for name, top1 in INT8.items()
    ),
)


@torch.no_grad()
def median_seconds(*network) -> tuple[float, dict[str, int]]:
    """Seconds of a call of a network, which is loaded once in a process, and its kernels."""
    compute, kernels = load(*network)
    seconds = []
    while sum(seconds) < SHORTEST_SECONDS:
        started = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - started)
    return median(seconds), kernels


@cache
def load(engine: Callable, file: Path, threads: int, batch: int, image_size: int) -> Loaded:
    return engine(file, threads, torch.randn(batch, 3, image_size, image_size))


def as_markdown(results: dict) -> str:
    """Every measurement, with its ratio to the baseline and the kernels that ran."""
    setting = itemgetter("threads", "batch")
    rows = sorted(results["rows"], key=setting)
    baselines = {setting(row): row["milliseconds"] for row in rows if row["name"] == BASELINE}
    release = results["versions"]["openvino"].split("-")[0]
    lines = table(
        {
            "": row["name"],
            "threads": str(row["threads"]),
            "batch": str(row["batch"]),
            "ms": f"{row['milliseconds']:.1f} ({row['low']:.1f} to {row['high']:.1f})",
            "images/s": f"{row['images_per_second']:.0f}",
            f"times {BASELINE}": f"{baselines[setting(row)] / row['milliseconds']:.2f}",
            "published top-1 %": f"{row['published']:.1f}",
            "kernels": ", ".join(f"{n} {kernel}" for kernel, n in row["kernels"].items()),
        }
        for row in rows
    )
    return (
        f"{results['network']}, {results['image_size']} pixels, {results['date']},"
        f" {results['machine']}, OpenVINO {release}; medians of {results['rounds']} interleaved"
        f" rounds (lowest to highest).\n\n{lines}\n"
    )


def draw(results: dict) -> Figure:
    """Published accuracy against measured latency, for the fewest threads and images."""
    first = {name: min(row[name] for row in results["rows"]) for name in ("threads", "batch")}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in results["rows"]:
        if first.items() <= row.items():
            middle = row["milliseconds"]
            spread = [[middle - row["low"]], [row["high"] - middle]]
            label = f"{row['name']}: {middle:.1f} ms"
            axes.errorbar(middle, row["published"], xerr=spread, fmt="o", label=label)
    axes.set(
        xscale="log",
        xlabel=f"ms for a batch of {first['batch']}, threads: {first['threads']}",
        ylabel="published ImageNet top-1 %",
    )
    axes.set_title(f"{results['network']}, {results['machine']}, {results['date']}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
