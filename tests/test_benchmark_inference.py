"""The inference benchmark: a contender measured in its process, table and picture from results."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from torch import nn

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

from models import MODELS, build_model
from models.export.onnx import write_onnx
from models.export.openvino import write_openvino
from models.layers import GlobalAvgPool
from scripts.benchmarks.inference import (
    CONTENDERS,
    INT8,
    PUBLISHED,
    draw,
    median_seconds,
    openvino,
    write_int8,
)
from scripts.benchmarks.timing import fresh_process

PAGE = ROOT / "docs" / "results" / "inference"
BITS = [contender for contender in CONTENDERS if contender.file == "reactnet_a.xml"]


@pytest.mark.parametrize("contender", [BITS[0], BITS[-1]], ids=lambda c: c.name)
def test_a_contender_is_measured_in_its_process_with_its_kernels(tmp_path, contender):
    model = build_model("reactnet_a", width=1 / 8, small_images=True, latent_init="symmetric")
    write_openvino(model, tmp_path / contender.file, 32, None, 32)
    with fresh_process(contender.environment) as process:
        network = contender.engine, tmp_path / contender.file, 1, 2, 32
        seconds, kernels = process.submit(median_seconds, *network).result()
    assert seconds > 0
    binary = {k: n for k, n in kernels.items() if k.startswith("BinaryConvolution ")}
    assert sum(binary.values()) == 26  # 31, of which each of five pairs is computed as one
    assert not any("ref" in kernel for kernel in binary)
    if contender.environment:
        assert binary == {"BinaryConvolution jit_avx2_u1": 26}


def test_what_is_called_int8_is_computed_in_int8(tmp_path):
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), GlobalAvgPool()]
    real, quantized = tmp_path / "real.onnx", tmp_path / "int8.onnx"
    write_onnx(nn.Sequential(*layers).eval(), real, 32, None, 32)
    write_int8(real, quantized, 32)
    _, kernels = openvino(quantized, 1, torch.zeros(1, 3, 32, 32))
    assert sum(kernels.values()) == 2
    assert all(name.lower().endswith("i8") for name in kernels), kernels


def test_table_and_picture_come_from_the_results(run_script, tmp_path):
    shutil.copy(PAGE / "results.json", tmp_path)
    redrawn = run_script("benchmarks.inference", "--output", tmp_path, "--redraw")
    assert redrawn.code == 0, redrawn.err
    assert (tmp_path / "table.md").read_text() == (PAGE / "table.md").read_text()
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_every_network_is_compared_and_drawn_at_its_published_accuracy():
    assert {c.network for c in CONTENDERS} == PUBLISHED.keys() == {*MODELS, *INT8}
    results = json.loads((PAGE / "results.json").read_text())
    (axes,) = draw(results).axes
    points = axes.get_legend_handles_labels()[0]
    accuracies = {PUBLISHED[row["network"]] for row in results["rows"]}
    assert {float(point.lines[0].get_ydata()[0]) for point in points} == accuracies
    looks = {(point.lines[0].get_color(), point.lines[0].get_marker()) for point in points}
    assert len(looks) == len(points) == len(CONTENDERS)
    assert len({colour for colour, _ in looks}) == 3
