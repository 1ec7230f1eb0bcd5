"""The inference benchmark: a contender measured in its process, table and picture from results."""

import json
import subprocess
import sys

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
    BASELINE,
    CONTENDERS,
    INT8,
    PUBLISHED,
    as_markdown,
    draw,
    median_seconds,
    openvino,
    write_int8,
)
from scripts.benchmarks.timing import fresh_process

BITS = [contender for contender in CONTENDERS if contender.file == "network.xml"]


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


def results() -> dict:
    row = {"threads": 1, "kernels": {"BinaryConvolution jit_avx512_u1": 26}}
    measured = [(BASELINE, "reactnet_a", 100.0), ("OpenVINO, 1 bit", "reactnet_a", 8.0)]
    measured += [(name, name, 10.0) for name in (*MODELS, *INT8) if name != "reactnet_a"]
    return {
        "date": "2026-01-01",
        "machine": "2 cores",
        "versions": {"openvino": "2026.4.1-22982", "torch": "2"},
        "network": "reactnet_a",
        "image_size": 224,
        "rounds": 3,
        "rows": [
            row
            | {"name": name, "network": network, "batch": batch, "milliseconds": ms}
            | {"low": ms - 0.5, "high": ms + 1}
            for batch in (1, 16)
            for name, network, ms in measured
        ],
    }


def test_table_and_picture_come_from_the_results(run_script, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    redrawn = run_script("benchmarks.inference", "--output", tmp_path, "--redraw")
    assert redrawn.code == 0, redrawn.err
    table = (tmp_path / "table.md").read_text()
    assert table == as_markdown(results())
    assert "| 8.0 (7.5 to 9.0) | 125 | 12.50 |" in " ".join(table.split())
    assert "26 BinaryConvolution jit_avx512_u1" in table
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_every_network_is_compared_and_drawn_at_its_published_accuracy():
    assert {c.network for c in CONTENDERS if c.network} == PUBLISHED.keys() == {*MODELS, *INT8}
    (axes,) = draw(results()).axes
    points = axes.get_legend_handles_labels()[0]
    accuracies = {PUBLISHED[row["network"]] for row in results()["rows"]}
    assert {float(point.lines[0].get_ydata()[0]) for point in points} == accuracies
    looks = {(point.lines[0].get_color(), point.lines[0].get_marker()) for point in points}
    assert len(looks) == len(points) == 1 + len(PUBLISHED)
    assert len({colour for colour, _ in looks}) == 3


def test_missing_folders_and_results_are_one_sentence(run_script, tmp_path):
    nowhere = ("benchmarks.inference", "--output", tmp_path / "none")
    run_script(*nowhere).assert_one_sentence("there is no folder", "make it first")
    redraw = ("benchmarks.inference", "--output", tmp_path, "--redraw")
    run_script(*redraw).assert_one_sentence("missing or damaged", "--redraw")


def test_the_package_is_a_program(tmp_path):
    program = [sys.executable, "-m", "scripts.benchmarks.inference"]
    options = ["--output", str(tmp_path), "--redraw"]
    run = subprocess.run([*program, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "missing or damaged" in run.stderr
