"""The inference benchmark: a contender measured in its process, table and picture from results."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

from models import build_model
from models.export.openvino import write_openvino
from scripts.benchmarks.inference import BASELINE, CONTENDERS, as_markdown, median_seconds
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
            for name, ms in ((BASELINE, 100.0), ("OpenVINO, 1 bit", 8.0))
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
