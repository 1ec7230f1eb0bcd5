"""The page of a GPU, and the script that runs each part once."""

import os
import subprocess
import sys

import pytest
from conftest import HAS_GPU, ROOT

from scripts.benchmarks.gpu import PAGE


def on_gpu(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / "scripts" / "on_gpu.sh", *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_a_part_runs_once_and_the_page_holds_what_it_gave(tmp_path, image_folder):
    before = PAGE.read_text()
    chosen = (tmp_path, "--tiny", "training-cpu-1")
    first = on_gpu(*chosen, DATA=str(image_folder))
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "training-cpu-1.done").exists()
    assert "| training-cpu-1 |" in (tmp_path / "README.md").read_text()
    assert PAGE.read_text() == before
    assert on_gpu(*chosen, PYTHON="true").stdout == "training-cpu-1: done before\n"


def test_a_part_that_fails_or_is_cut_off_is_named_and_not_done(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *sys*|*tensorboard) exit 1;; *workers*) exit 75;; *speed*) exit 3;; esac'
    )
    python.chmod(0o755)
    result = on_gpu(tmp_path, "--tiny", PYTHON=str(python))
    assert result.returncode == 1
    assert "speed-2-float32: failed with code 3, see" in result.stderr
    assert "workers: not done after 8 minutes; the same command goes on" in result.stdout
    assert "training-cpu-1: skipped, there is no package tensorboard" in result.stdout
    assert [path.name for path in tmp_path.glob("*.done")] == ["tests-data.done"]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    result = on_gpu(tmp_path)
    assert result.returncode == 2 and "torch can use no GPU: pass --tiny" in result.stderr
