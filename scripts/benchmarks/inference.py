"""How fast a binary network predicts: on engines with and without bits, and beside other networks.

    mkdir -p docs/results/inference
    python -m scripts.benchmarks.inference --output docs/results/inference
    python -m scripts.benchmarks.inference --output docs/results/inference --redraw

Every contender runs in a process of its own.  In each round each one is measured once, in turn, so
that what else slows the machine slows them all; numbers are medians over rounds, with the lowest
and the highest.  Writes `results.json` and from it `table.md` and `latency.png`; --redraw makes
these two again.  Needs requirements-export.txt and requirements-openvino.txt.

Weights do not change the time: they are random.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from functools import cache, partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from statistics import median
from timeit import timeit
from types import SimpleNamespace

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor

from models import MODELS, build_model
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
    "resnet18": 69.494,  # this and the next: torchvision's, of its int8 weights
    "mobilenet_v2": 71.658,
}
NETWORK = "reactnet_a"  # which all engines compute
OTHERS = [name for name in MODELS if name != NETWORK]
INT8 = ("resnet18", "mobilenet_v2")
COMPUTING = ("Convolution", "BinaryConvolution", "FullyConnected", "MatMul")
SHORTEST_SECONDS = 0.3  # of a measurement: as many calls as fill it, at least one


@command
def main() -> None:
    parser = Parser(__doc__)
    add_output_options(parser)
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=positive, default=7)
    write_page(parser.parse_args(), "latency.png", measure, as_markdown, draw)


def measure(arguments: argparse.Namespace) -> dict:
    engine = load_engine()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_networks(Path(folder), arguments.image_size)
        for threads in arguments.threads:
            rows += measure_contenders(Path(folder), threads, arguments)
    return {
        "date": date.today().isoformat(),
        "machine": processor(),
        "versions": {"openvino": engine.__version__, "torch": torch.__version__},
        "network": NETWORK,
        "image_size": arguments.image_size,
        "rounds": arguments.rounds,
        "rows": rows,
    }


def write_networks(folder: Path, image_size: int) -> None:
    """The files of the contenders, each for any batch."""
    options = image_size, None, image_size
    for name in MODELS:
        model = build_model(name, latent_init="symmetric").eval()
        write_openvino(model, folder / f"{name}.xml", *options)
        if name == NETWORK:
            torch.save(to_reference(model), folder / "reference.pth")
            torch.save(model, folder / "trained.pth")
            torch.save(to_plain_convs(model), folder / "plain.pth")
            write_onnx(model, folder / f"{name}.onnx", *options)
    for name in INT8:
        real = folder / f"{name}.onnx"
        write_onnx(torchvision.models.get_model(name).eval(), real, *options)
        write_int8(real, folder / f"{name}.int8.onnx", image_size)


def write_int8(source: Path, target: Path, image_size: int) -> None:
    """Quantize statically, per output channel, with the ranges that random images give."""
    from onnxruntime.quantization import QuantType, quantize_static

    images = np.random.default_rng(0).normal(size=(2, 3, image_size, image_size))
    batches = iter([{"images": images.astype(np.float32)}])
    reader = SimpleNamespace(get_next=lambda: next(batches, None))
    # With signed activations OpenVINO computes in float32 on CPUs with AMX.
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(source, target, reader, per_channel=True, **types)


def measure_contenders(folder: Path, threads: int, arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each batch and contender."""
    with ExitStack() as stack:
        processes = [stack.enter_context(fresh_process(one.environment)) for one in CONTENDERS]
        for batch in arguments.batches:
            sides = {}
            for contender, process in zip(CONTENDERS, processes, strict=True):
                file = folder / contender.file
                network = contender.engine, file, threads, batch, arguments.image_size
                sides[contender] = partial(process.submit, median_seconds, *network)
            measured = interleaved(sides, arguments.rounds, lambda submit: submit().result())
            for contender, measurements in measured.items():
                milliseconds = [1000 * seconds for seconds, _ in measurements]
                _, kernels = measurements[0]
                yield {
                    "name": contender.name,
                    "threads": threads,
                    "batch": batch,
                    "milliseconds": median(milliseconds),
                    "low": min(milliseconds),
                    "high": max(milliseconds),
                    "kernels": kernels,
                    "network": contender.network,
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
    network: str = NETWORK  # in the file


BASELINE = "onnxruntime, float32"  # what the table's ratios compare with
AVX512_BW = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2 = AVX512_BW | {"OV_CPU_MAX_ISA": "AVX2"}
CONTENDERS = (
    Contender("PyTorch, reference", pytorch, "reference.pth"),
    Contender("PyTorch, as trained here", pytorch, "trained.pth"),
    Contender("PyTorch, weights binarized once", pytorch, "plain.pth"),
    Contender(BASELINE, onnxruntime, f"{NETWORK}.onnx"),
    Contender("OpenVINO, float32", openvino, f"{NETWORK}.onnx"),
    Contender("OpenVINO, 1 bit", openvino, f"{NETWORK}.xml"),
    Contender("OpenVINO, 1 bit, no VPOPCNTDQ", openvino, f"{NETWORK}.xml", AVX512_BW),
    Contender("OpenVINO, 1 bit, held to AVX2", openvino, f"{NETWORK}.xml", AVX2),
    *(Contender(f"OpenVINO, 1 bit {n}", openvino, f"{n}.xml", network=n) for n in OTHERS),
    *(Contender(f"OpenVINO, int8 {n}", openvino, f"{n}.int8.onnx", network=n) for n in INT8),
)


@torch.no_grad()
def median_seconds(*network) -> tuple[float, dict[str, int]]:
    """Seconds of a call of a network, which is loaded once in a process, and its kernels."""
    compute, kernels = load(*network)
    seconds = []
    while sum(seconds) < SHORTEST_SECONDS:
        seconds.append(timeit(compute, number=1))
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
            "images/s": f"{1000 * row['batch'] / row['milliseconds']:.0f}",
            f"times {BASELINE}": f"{baselines[setting(row)] / row['milliseconds']:.2f}",
            "published top-1 %": f"{PUBLISHED[row['network']]:.1f}",
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
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in results["rows"] if first.items() <= row.items()]
    for row, marker in zip(rows, cycle("os^vD*PX")):
        is_compared, is_int8 = row["network"] == results["network"], row["network"] in INT8
        middle = row["milliseconds"]
        axes.errorbar(
            middle,
            PUBLISHED[row["network"]],
            xerr=[[middle - row["low"]], [row["high"] - middle]],
            fmt=marker,
            color="tab:blue" if is_compared else "tab:red" if is_int8 else "tab:green",
            label=f"{row['name']}: {middle:.1f} ms",
        )
    axes.set(
        xscale="log",
        xlabel=f"ms for a batch of {first['batch']}, threads: {first['threads']}",
        ylabel="published ImageNet top-1 %",
    )
    title = f"{results['network']} (blue), other binary networks (green), int8 (red)"
    axes.set_title(f"{title}\n{results['machine']}, {results['date']}", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8)
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
