"""Machines as people have them: what is too small, missing or killed is one sentence."""

import multiprocessing
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ITERATIONS, ROOT, STEP1, TINY

from utils import launch
from utils.data import loader
from utils.data.loader import FILE_HANDLES, check_workers
from utils.run.config import parse_config
from utils.run.distributed import DistEnv
from utils.run.errors import UserError
from utils.run.logging import RunLog, faster_options
from utils.run.state import TrainState

# One worker has two batches ready besides the one in use, of three bytes a pixel.
BATCHES = 3 * TINY["batch_size"] * 3 * 224**2
SIZES = {"workers": 1, "image_size": 224, "val_resize": 224}


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def shared_memory(tmp_path, monkeypatch):
    """Call it with the free bytes."""

    def set_free(free: int) -> None:
        monkeypatch.setattr("utils.data.loader.SHARED_MEMORY", tmp_path)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))

    return set_free


def test_too_little_shared_memory_is_one_sentence_before_training(
    run_step, shared_memory, tmp_path
):
    shared_memory(BATCHES - 1)
    run_step(1, **SIZES).assert_one_sentence("has 4 MB free", "need 4 MB", "--shm-size")
    assert not (tmp_path / "step1").exists()


def test_the_shared_memory_of_a_machine_is_that_of_all_its_processes(shared_memory, monkeypatch):
    config = replace(parse_config(STEP1, []), **SIZES)
    shared_memory(BATCHES)
    check_workers(config, TINY["batch_size"])
    check_workers(replace(config, workers=0), 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="need 7 MB"):
        check_workers(config, TINY["batch_size"])


def test_too_few_file_handles_are_one_sentence_and_a_soft_limit_is_raised(run_step, monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    run_step(1, workers=1).assert_one_sentence("64 open files", "ulimit -n", "--workers")
    assert not raised
    for soft, expected in ((64, FILE_HANDLES), (10**5, 10**5)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, 10**6))
        check_workers(parse_config(STEP1, ["--workers", "1"]), 1)
        assert raised[-1] == (expected, 10**6)


def test_a_killed_loading_worker_is_one_sentence_and_the_same_command_goes_on(
    run_step, monkeypatch
):
    def kill_workers(*_):
        for worker in multiprocessing.active_children():
            worker.kill()

    options = {"workers": 1, "checkpoint_minutes": 0}
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_step_end", kill_workers)
        result = run_step(1, **options)
    assert result.code == 1
    result.assert_one_sentence("a loading worker ended (", "the same command goes on")
    result = run_step(1, **options)
    assert result.code == 0 and "of this run, which goes on" in result.out


# The device


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """A machine that has nothing of a GPU."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("utils.run.device.DRIVER", tmp_path / "no driver")


@pytest.fixture
def driver(no_gpu, monkeypatch, tmp_path):
    """Its driver is for CUDA 12.4."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "nvidia-smi", "echo '| Driver Version: 550.54.15   CUDA Version: 12.4   |'")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "an NVIDIA driver is installed"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES is 0"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS is 0"),
    ],
)
def test_a_gpu_that_was_promised_and_cannot_be_used_stops_a_run(
    run_step, driver, monkeypatch, variables, words
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wanted = f"for CUDA {torch.version.cuda or 'none'}"
    run_step(1).assert_one_sentence(words, "driver is for CUDA 12.4", wanted, "--device cpu")
    assert run_step(1, epochs=1, device="cpu").code == 0


def test_hidden_gpus_are_not_expected(run_step, driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_step(1, epochs=1).code == 0


def test_without_any_promise_the_cpu_is_used_unless_a_gpu_is_asked_for(
    run_step, run_script, no_gpu, tmp_path
):
    assert run_step(1, epochs=1).code == 0
    options = ("--device", "cuda")
    run_step(1, *options).assert_one_sentence("--device cuda was given, but no NVIDIA driver")
    file = tmp_path / "step1" / "checkpoint.pth.tar"
    run_script("evaluate", file, *options).assert_one_sentence("--device cuda was given")


def test_on_the_cpu_one_process_is_started_however_many_gpus_there_are(monkeypatch):
    def execv(*_):
        raise SystemExit("one plain process")

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch.py", "train.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="one plain process"):
        launch.main()


# The first minutes


def test_the_first_iterations_tell_pace_and_hours_left_once(run_step, monkeypatch, tmp_path):
    result = run_step(1, save=tmp_path / "whole_epoch")
    line = f"the first {ITERATIONS} iterations took"
    assert result.out.count(line) == 1 and "hours of training left" in result.out
    monkeypatch.setattr("utils.run.logging.PACE_AFTER", 2)
    assert run_step(1).out.count("the first 2 iterations took") == 1


def test_on_a_gpu_the_first_iterations_tell_its_memory_and_the_speed_options_that_are_off(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (14e9, 24e9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config = parse_config(STEP1, ["--save", str(tmp_path), "--compile", "true"])
    state = TrainState(iteration=1)
    with RunLog(config, DistEnv(0, 1, torch.device("cuda")), state, iterations=1) as log:
        log.on_step_end(state)
    line = capsys.readouterr().out
    assert "10.0 of 24.0 GB of GPU memory" in line
    assert line.endswith("; faster with --precision bfloat16 --channels_last true\n")


@pytest.mark.parametrize(
    ("kind", "capability", "precision", "faster"),
    [
        ("cuda", (8, 0), "float32", "--precision bfloat16"),
        ("cuda", (7, 0), "float32", ""),
        ("cuda", (7, 0), "bfloat16", "--precision float32"),
        ("cpu", "AVX512", "bfloat16", ""),
        ("cpu", "AVX2", "bfloat16_residual", "--precision float32"),
        ("cpu", "AVX2", "float32", ""),
    ],
)
def test_bfloat16_is_advised_only_where_it_is_not_emulated(
    kind, capability, precision, faster, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    options = ["--precision", precision, "--compile", "true", "--channels_last", "true"]
    assert faster_options(parse_config(STEP1, options), torch.device(kind)) == faster


# The installation


def set_up(python: Path | str, venv: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-ec", f"source {ROOT}/scripts/environment.sh requirements.txt"],
        env={**os.environ, "PYTHON": str(python), "VENV": str(venv)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("version", "code"), [("3.10.13", 2), ("3.15.0", 2), ("3.11.0", 77), ("3.14.2", 77)]
)
def test_python_must_be_3_11_to_3_14(tmp_path, version, code):
    script = f'[ "$1" = --version ] && echo Python {version} || exit 77'  # to make the environment
    python = executable(tmp_path / "python", script)
    result = set_up(python, tmp_path / "venv")
    assert result.returncode == code
    if code == 2:
        assert result.stderr.startswith("error: Python 3.11 to 3.14 is needed")
        assert f"Python {version}" in result.stderr and result.stderr.count("\n") == 1


def test_a_python_that_is_not_there_is_named(tmp_path):
    result = set_up("python9", tmp_path / "venv")
    assert result.returncode == 2 and "and python9 is: " in result.stderr


def test_every_required_version_is_in_the_lock_file():
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text().lower().splitlines()
        return {line.partition(" ;")[0] for line in lines if line and not line.startswith("#")}

    required = {path.name for path in ROOT.glob("requirements*.txt")} - {"requirements-lock.txt"}
    assert set().union(*map(pins, required)) < pins("requirements-lock.txt")


def test_without_a_number_the_workers_are_the_cores_that_a_process_has(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [loader.loading_workers(wanted) for wanted in (None, 0, 5, 99)] == [2, 0, 5, 16]
