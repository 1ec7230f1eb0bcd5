"""The inference benchmark: a contender measured in its process, table and picture from results."""

import argparse
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from test_exact_and_packed import trained_like

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

from models.export.openvino import write_openvino
from scripts.benchmark_inference import CONTENDERS, REFERENCE, Worker, as_table

BITS = [contender for contender in CONTENDERS if contender.file == "network.xml"]


@pytest.mark.parametrize("contender", [BITS[0], BITS[-1]], ids=lambda c: c.name)
def test_a_contender_is_measured_in_its_process_and_tells_its_kernels(tmp_path, contender):
    model = trained_like("reactnet_a").float()
    write_openvino(model, tmp_path / contender.file, 32, None, 32)
    worker = Worker(contender, 1, tmp_path)
    try:
        told = worker.measure(2, argparse.Namespace(image_size=32))
    finally:
        worker.stop()
    assert told["seconds"] > 0
    binary = {k: n for k, n in told["kernels"].items() if k.startswith("BinaryConvolution ")}
    assert sum(binary.values()) == 26  # 31, of which each of five pairs is computed as one
    assert not any("ref" in kernel for kernel in binary)
    if contender.environment:
        assert binary == {"BinaryConvolution jit_avx2_u1": 26}
    assert worker.process.returncode == 0


def results() -> dict:
    row = {"threads": 1, "published": 70.5}
    row |= {"images_per_second": 125.0, "kernels": {"BinaryConvolution jit_avx512_u1": 26}}
    return {
        "date": "2026-01-01",
        "machine": "2 cores",
        "versions": {"openvino": "2026.4.1-22982", "torch": "2"},
        "network": "reactnet_a",
        "image_size": 224,
        "rounds": 3,
        "rows": [
            row
            | {"name": name, "batch": batch, "milliseconds": ms}
            | {"low": ms - 0.5, "high": ms + 1}
            for batch in (1, 16)
            for name, ms in ((REFERENCE, 100.0), ("OpenVINO, 1 bit", 8.0))
        ],
    }


def test_table_and_picture_come_from_the_results(run_script, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    drawn = run_script("benchmark_inference", "--output", tmp_path, "--redraw")
    assert drawn.code == 0, drawn.err
    table = (tmp_path / "table.md").read_text()
    assert table == as_table(results())
    assert (
        "8.0 (7.5 to 9.0) | 125 | 12.50 |" in table
        and "26 BinaryConvolution jit_avx512_u1" in table
    )
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_missing_folders_and_results_are_one_sentence(run_script, tmp_path):
    nowhere = ("benchmark_inference", "--output", tmp_path / "none")
    run_script(*nowhere).assert_one_sentence("there is no folder", "make it first")
    redraw = ("benchmark_inference", "--output", tmp_path, "--redraw")
    run_script(*redraw).assert_one_sentence("missing or damaged", "--redraw")


def test_the_benchmark_script_passes_its_options_on(tmp_path):
    program = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "inference"]
    options = ["--output", str(tmp_path), "--redraw"]
    run = subprocess.run([*program, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "missing or damaged" in run.stderr
