"""The page of a GPU: kinds of kernels, tables, and the script that runs each part once."""

import json
import os
import subprocess
import sys

import pytest
from conftest import HAS_GPU, ROOT

from scripts.benchmarks.gpu import PAGE, kind

CALCULATED = json.loads((PAGE / "calculated.json").read_text())["after"]["student"]["kinds"]
NORM = "native_batch_norm_legit_functional"


@pytest.mark.parametrize(
    ("name", "microseconds", "graph", "expected"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", 300.0, "forward", "convolution forward"),
        ("cutlass_tensorop_bf16_s16816dgrad_optimized", 300.0, "backward", "convolution dgrad"),
        ("sm90_xmma_wgrad_implicit_gemm_indexed_bf16", 300.0, "backward", "convolution wgrad"),
        ("nvjet_tst_128x64", 9.0, "backward", "other"),
        ("void at::native::vectorized_elementwise_kernel", 9.0, "forward", "other"),
        ("triton_per_fused__to_copy_abs_add_lt_mean_mul_6", 2.5, "forward", "weight binarization"),
        ("triton_poi_fused__to_copy_abs_le_mul_3", 2.5, "backward", "weight binarization"),
        (f"triton_red_fused__{NORM}_2", 58.8, "forward", "BN statistics"),
        (f"triton_red_fused__{NORM}_3", 2.5, "forward", "small finishing kernels"),
        (f"triton_poi_fused__{NORM}__to_copy_add_lt_mul_5", 154.1, "forward", "pointwise forward"),
        ("triton_poi_fused__to_copy_abs_add_addcmul_clamp", 99.0, "backward", "pointwise backward"),
        ("triton_red_fused__to_copy_abs_add_clamp_mul_sum", 99.0, "backward", "reductions"),
    ],
)
def test_kernels_are_told_apart_by_name_time_and_pass(name, microseconds, graph, expected):
    assert kind(name, microseconds, graph) == expected and expected in CALCULATED


def test_the_page_says_so_where_nothing_was_measured_and_sets_measured_beside_calculated(
    run_script, tmp_path
):
    def page() -> str:
        result = run_script("benchmarks.gpu", "page", tmp_path)
        assert result.code == 0, result.err
        return (tmp_path / "README.md").read_text()

    nothing = "Nothing has been measured yet.\n"
    prose_and_counted = (PAGE / "README.md").read_text().partition("## Measured")[0]
    assert page() == f"{prose_and_counted}## Measured\n\n{nothing}"
    measured = {"date": "", "machine": "X", "torch": "2", "case": "", "batch": 256, "step, ms": 50}
    kinds = {"convolution wgrad": [27, 8.25], "optimizer": [3, 0.5]}
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").write_text(json.dumps(measured | {"kinds": kinds}))
    assert nothing not in page() and "50.0 ms by the clock, 8.8 ms in kernels" in page()
    counted = CALCULATED["convolution wgrad"]
    row = f"convolution wgrad | {counted['launches']} | 27 | {counted['ms']:.2f} | 8.25 |"
    assert row in " ".join(page().split())


def on_gpu(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / "scripts" / "on_gpu.sh", *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_a_part_runs_once_and_the_page_holds_what_it_gave(tmp_path, image_folder):
    before = (PAGE / "README.md").read_text()
    chosen = (tmp_path, "--tiny", "training-cpu-1")
    first = on_gpu(*chosen, DATA=str(image_folder))
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "training-cpu-1.done").exists()
    assert "| training-cpu-1 |" in (tmp_path / "README.md").read_text()
    assert (PAGE / "README.md").read_text() == before
    assert on_gpu(*chosen, PYTHON="true").stdout == "training-cpu-1: done before\n"


def test_a_part_that_fails_or_is_cut_off_is_named_and_not_done(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *sys*|*tensorboard) exit 1;; *speed*) exit 3;; *" profile "*) exit 75;; esac'
    )
    python.chmod(0o755)
    result = on_gpu(tmp_path, "--tiny", PYTHON=str(python))
    assert result.returncode == 1
    assert "speed-2-float32: failed with code 3, see" in result.stderr
    assert "profile: not done after 8 minutes; the same command goes on" in result.stdout
    assert "training-cpu-1: skipped, there is no package tensorboard" in result.stdout
    assert [path.name for path in tmp_path.glob("*.done")] == ["tests-data.done"]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    result = on_gpu(tmp_path)
    assert result.returncode == 2 and "torch can use no GPU: pass --tiny" in result.stderr
