"""How fast a binary network answers: on engines with and without bits, and beside int8 networks.

    python scripts/benchmark.py inference --output docs/results/inference [--file FILE]
    python scripts/benchmark.py inference --output docs/results/inference --redraw

Every contender runs in a process of its own.  In each round each one is measured once, in turn, so
that what else slows the machine slows them all; numbers are medians over rounds, with the lowest
and the highest.  Writes `results.json` and from it `table.md` and `latency.png`; --redraw makes
these two again.  Needs requirements-export.txt and requirements-openvino.txt.

Weights do not change the time: without --file they are drawn, and so are the int8 networks'.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
import torchvision
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torchvision.models import quantization

from models import MODELS, build_model
from models.export.fold import to_plain_convs
from models.checkpoints import load_network
from models.export.onnx import write_onnx
from models.export.openvino_selftest import PRECISION
from models.export.openvino import load_engine, write_openvino
from tests.composed import composed
from utils.run.command_line import Parser, command, positive
from utils.run.errors import UserError
from utils.results import add_output_options, measure_and_draw, processor

PUBLISHED = {
    "reactnet_a": 70.5,
    "reactnet_r18": 65.5,
    "bireal_r18": 56.4,
    "strong_baseline_r18": 63.2,
}
# Their accuracy is the one that torchvision publishes of its int8 weights.
INT8 = {
    "resnet18": quantization.ResNet18_QuantizedWeights.DEFAULT,
    "mobilenet_v2": quantization.MobileNet_V2_QuantizedWeights.DEFAULT,
}
COMPUTING = ("Convolution", "BinaryConvolution", "FullyConnected", "MatMul")
SHORTEST_SECONDS = 0.3  # of a measurement: as many calls as fill it, at least one


@dataclass(frozen=True)
class Contender:
    """Something to measure: how it computes, on what file, and held to which instructions.

    OV_CPU_MAX_ISA holds OpenVINO's own kernels and ONEDNN_MAX_CPU_ISA those of the library in it;
    the kernels of binary convolutions ask the second one whether VPOPCNTDQ is there.
    """

    name: str
    engine: str
    file: str
    environment: Mapping[str, str] = field(default_factory=dict)
    published: float | None = None


REFERENCE = "onnxruntime, float32"  # what the table's ratios compare with
AVX512_BW = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2 = AVX512_BW | {"OV_CPU_MAX_ISA": "AVX2"}
CONTENDERS = (
    Contender("PyTorch, composed as released", "as_released", "network.pth"),
    Contender("PyTorch, as trained here", "trained", "network.pth"),
    Contender("PyTorch, weights binarized once", "plain", "network.pth"),
    Contender(REFERENCE, "onnxruntime", "network.onnx"),
    Contender("OpenVINO, float32", "openvino", "network.onnx"),
    Contender("OpenVINO, 1 bit", "openvino", "network.xml"),
    Contender("OpenVINO, 1 bit, no VPOPCNTDQ", "openvino", "network.xml", AVX512_BW),
    Contender("OpenVINO, 1 bit, held to AVX2", "openvino", "network.xml", AVX2),
    *(
        Contender(
            f"OpenVINO, int8 {name}",
            "openvino",
            f"{name}.int8.onnx",
            published=weights.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        )
        for name, weights in INT8.items()
    ),
)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_output_options(parser)
    parser.add_argument("--file", type=Path, help="checkpoint to measure, instead of --model")
    parser.add_argument("--model", choices=MODELS, default="reactnet_a")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=positive, default=7)
    return parser.parse_args()


@command
def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        answer_measurements(*sys.argv[2:])
        return
    measure_and_draw(parse(), "latency.png", measured, as_table, drawn)


def measured(arguments: argparse.Namespace) -> dict:
    engine = load_engine()
    if arguments.file:
        loaded = load_network(arguments.file, defaults={"binary_weights": True})
        model, name = loaded.model, loaded.name
    else:
        name = arguments.model
        model = build_model(name, width=arguments.width, latent_init="symmetric").eval()
    with tempfile.TemporaryDirectory() as folder:
        write_files(model, Path(folder), arguments.image_size)
        rows = []
        for threads in arguments.threads:
            rows += measured_with(threads, Path(folder), arguments)
    for row in rows:
        row["published"] = row["published"] or PUBLISHED[name]
    return {
        "date": date.today().isoformat(),
        "machine": processor(),
        "versions": {"openvino": engine.__version__, "torch": torch.__version__},
        "network": name,
        "image_size": arguments.image_size,
        "rounds": arguments.rounds,
        "rows": rows,
    }


def write_files(model: nn.Module, folder: Path, image_size: int) -> None:
    """What the contenders read, each for any batch."""
    torch.save(model, folder / "network.pth")
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

    quantize_static(
        source,
        target,
        RandomImages(),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )


def measured_with(threads: int, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """One row for each contender and batch."""
    workers = {contender.name: Worker(contender, threads, folder) for contender in CONTENDERS}
    try:
        rows = []
        for batch in arguments.batches:
            told = {name: worker.measure(batch, arguments) for name, worker in workers.items()}
            seconds = {name: [] for name in workers}
            for _ in range(arguments.rounds):
                for name, worker in workers.items():
                    seconds[name].append(worker.measure(batch, arguments)["seconds"])
            for contender in CONTENDERS:
                values = [1000 * value for value in seconds[contender.name]]
                rows.append(
                    {
                        "name": contender.name,
                        "threads": threads,
                        "batch": batch,
                        "milliseconds": statistics.median(values),
                        "low": min(values),
                        "high": max(values),
                        "images_per_second": 1000 * batch / statistics.median(values),
                        "kernels": told[contender.name]["kernels"],
                        "published": contender.published,
                    }
                )
        return rows
    finally:
        for worker in workers.values():
            worker.stop()


class Worker:
    """A process that has loaded a contender and measures it when asked."""

    def __init__(self, contender: Contender, threads: int, folder: Path):
        self.name = contender.name
        told = (contender.engine, str(folder / contender.file))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *told, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **contender.environment, "OMP_NUM_THREADS": str(threads)},
        )

    def measure(self, batch: int, arguments: argparse.Namespace) -> dict:
        """Median seconds of a call on so many images, and the kernels that compute it."""
        try:
            print(batch, arguments.image_size, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name} could not be measured, as said above") from error

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


@torch.no_grad()
def answer_measurements(engine: str, file: str, threads: str) -> None:
    """The worker's side: lines of batch and image size in, measurements out."""
    torch.set_num_threads(int(threads))
    prepare = ENGINES[engine](Path(file), int(threads))
    runs = {}
    for line in sys.stdin:
        batch, size = map(int, line.split())
        if batch not in runs:
            runs[batch] = prepare(torch.randn(batch, 3, size, size))
            runs[batch][0]()
        run, kernels = runs[batch]
        seconds = []
        while sum(seconds) < SHORTEST_SECONDS:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": statistics.median(seconds), "kernels": kernels}), flush=True)


# From a file and a number of threads: from images, a call on them, and the kernels it runs.
Prepare = Callable[[torch.Tensor], tuple[Callable[[], object], dict[str, int]]]


def as_released(file: Path, threads: int) -> Prepare:
    model = composed(torch.load(file, weights_only=False))
    return lambda images: (lambda: model(images), {})


def trained(file: Path, threads: int) -> Prepare:
    model = torch.load(file, weights_only=False)  # written by the process that started this one
    return lambda images: (lambda: model(images), {})


def plain(file: Path, threads: int) -> Prepare:
    model = to_plain_convs(torch.load(file, weights_only=False))
    return lambda images: (lambda: model(images), {})


def onnxruntime(file: Path, threads: int) -> Prepare:
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def prepare(images: torch.Tensor):
        feed = {session.get_inputs()[0].name: images.numpy()}
        return lambda: session.run(None, feed), {}

    return prepare


def openvino(file: Path, threads: int) -> Prepare:
    import openvino as engine

    core = engine.Core()
    settings = PRECISION | {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}

    def prepare(images: torch.Tensor):
        network = core.read_model(file)
        network.reshape(list(images.shape))
        compiled = core.compile_model(network, "CPU", settings)
        request, pixels = compiled.create_infer_request(), images.numpy()
        return lambda: request.infer([pixels], share_inputs=True), kernel_counts(compiled)

    return prepare


def kernel_counts(compiled) -> dict[str, int]:
    """How many multiplying layers run with which of the engine's kernels."""
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(fact["layerType"].value, fact["primitiveType"].value) for fact in facts]
    return Counter(f"{layer} {kernel}" for layer, kernel in kinds if layer in COMPUTING)


ENGINES = {
    "as_released": as_released,
    "trained": trained,
    "plain": plain,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def as_table(results: dict) -> str:
    """Every measurement, with its ratio to the reference and the kernels that ran, in Markdown."""
    rows = results["rows"]
    batches, threads = ({row[name] for row in rows} for name in ("batch", "threads"))
    lines = [
        f"{results['network']}, {results['image_size']} pixels, {results['date']},"
        f" {results['machine']}, OpenVINO {results['versions']['openvino'].split('-')[0]};"
        f" medians of {results['rounds']} interleaved rounds (lowest to highest).",
        "",
        f"| | threads | batch | ms | images/s | times {REFERENCE} | published top-1 % | kernels |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for count in sorted(threads):
        for batch in sorted(batches):
            chosen = [row for row in rows if (row["threads"], row["batch"]) == (count, batch)]
            (reference,) = (row["milliseconds"] for row in chosen if row["name"] == REFERENCE)
            for row in chosen:
                kernels = ", ".join(f"{n} {kernel}" for kernel, n in row["kernels"].items())
                lines.append(
                    f"| {row['name']} | {count} | {batch}"
                    f" | {row['milliseconds']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
                    f" | {row['images_per_second']:.0f}"
                    f" | {reference / row['milliseconds']:.2f}"
                    f" | {row['published']:.1f} | {kernels} |"
                )
    return "\n".join(lines) + "\n"


def drawn(results: dict) -> Figure:
    """Published accuracy against measured latency, one image at a time on one thread."""
    rows = results["rows"]
    first = {name: min(row[name] for row in rows) for name in ("threads", "batch")}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    chosen = [row for row in rows if all(row[name] == first[name] for name in first)]
    for row in chosen:
        spread = [[row["milliseconds"] - row["low"]], [row["high"] - row["milliseconds"]]]
        label = f"{row['name']}: {row['milliseconds']:.1f} ms"
        axes.errorbar(row["milliseconds"], row["published"], xerr=spread, fmt="o", label=label)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms for a batch of {first['batch']}, threads: {first['threads']}")
    axes.set_ylabel("published ImageNet top-1 %")
    axes.set_title(f"{results['network']}, {results['machine']}, {results['date']}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
