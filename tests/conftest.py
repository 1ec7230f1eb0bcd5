"""A small image folder, and the two training programs run in this process."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from process import Result
from torch import nn

from models import build_model
from step1.train import main as step1_main
from step2.train import main as step2_main
from utils.data.shapes import draw_set
from utils.precision import set_precision
from utils.run.config import FIELDS
from utils.run.distributed import DistEnv

ROOT = Path(__file__).resolve().parents[1]
STEP1, STEP2 = ROOT / "step1" / "config.yaml", ROOT / "step2" / "config.yaml"
CPU = torch.device("cpu")
# On networks this small threads, also those of the programs that tests start, only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
HAS_GPU = torch.cuda.is_available()
# Where torch can use no GPU, none is expected, whatever driver the machine has.
if not HAS_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic where that is asked for
CLASSES = ("bars", "disc", "star")
TRAIN, VAL = 8, 5  # images of each class
ITERATIONS = 3  # of an epoch of the smallest run
# The smallest run of either step: 3 batches an epoch on a network of width 1/32.
TINY = {
    "image_size": 16,
    "val_resize": 16,
    "small_images": "true",
    "width": 1 / 32,
    "batch_size": 8,
    "epochs": 2,
    "workers": 0,
    "teacher": "none",
}
# Step 2 without step 1, at a rate that flips signs in every epoch.
FROM_SCRATCH = {"init_from": "none", "latent_init": "symmetric", "learning_rate": 0.01}


def write_images(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    draw_set(folder, classes, {"train": TRAIN, "val": VAL}, "{}.png")
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """Runs a test on the CPU and on a GPU; float32 is float32 there, not TF32."""
    if request.param == "cuda" and not HAS_GPU:
        pytest.skip("no GPU")
    set_precision("float32")
    return torch.device(request.param)


on_gpu = pytest.mark.parametrize("device", ["cuda"], indirect=True)  # there alone


def pytest_collection_modifyitems(items):
    """Where there is no GPU, a test that would run on it is skipped once, not for each case."""
    # Malformed input first: its processes are forked before others start autograd's threads here.
    items.sort(key=lambda item: "test_malformed" not in item.nodeid)
    skipped = set()
    for item in items.copy() if not HAS_GPU else ():
        if hasattr(item, "callspec") and item.callspec.params.get("device") == "cuda":
            if item.function in skipped:
                items.remove(item)
            skipped.add(item.function)


@pytest.fixture(autouse=True)
def gpu_is_hidden_unless_asked_for(request, monkeypatch):
    """What a test that takes no `device` starts computes on the CPU, also where there is a GPU."""
    if HAS_GPU and "device" not in request.fixturenames:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Read only: tests that change images make their own with `write_images`."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_images(tmp_path) -> Path:
    """A folder of images for a test to change."""
    return write_images(tmp_path / "images")


def command_line(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def config_with(**options: Any) -> SimpleNamespace:
    """A configuration at its defaults, for functions that take only some fields of it."""
    defaults = {name: field.default for name, field in FIELDS.items()}
    return SimpleNamespace(**{**defaults, "learning_rate": 1e-3, "weight_decay": 0.0, **options})


def tiny(name: str = "reactnet_r18", **options: Any) -> nn.Module:
    """A narrow network of three classes with drawn weights, the same every time."""
    torch.manual_seed(0)
    defaults = {"width": narrow(name, 1 / 16), "small_images": True, "latent_init": "symmetric"}
    return build_model(name, num_classes=3, **{**defaults, **options})


def narrow(name: str, width: float) -> float:
    """`width`, or the smallest that the groups of the network called `name` divide."""
    return max(width, 1 / 4) if name == "meliusnet29" else width


def dist_env(rank: int = 0, world_size: int = 1) -> DistEnv:
    return DistEnv(rank, world_size, CPU)


def run_main(main: Callable[[], None], arguments: list[str], monkeypatch, capsys) -> Result:
    """Run a program in this process and catch how it ends."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code
    return Result(code, *capsys.readouterr())


@pytest.fixture
def run_script(monkeypatch, capsys) -> Callable[..., Result]:
    """Run `scripts/NAME.py` with the arguments given."""

    def run(name: str, *arguments) -> Result:
        main = importlib.import_module(f"scripts.{name}").main
        return run_main(main, list(arguments), monkeypatch, capsys)

    return run


@pytest.fixture
def run_step(monkeypatch, capsys, tmp_path, image_folder) -> Callable[..., Result]:
    """Run `step` 1 or 2 with the options TINY, those given laid over them; None drops one."""

    def run(step: int, *flags: str, **options) -> Result:
        values = {**TINY, "data": image_folder, "save": tmp_path / f"step{step}", **options}
        arguments = command_line({k: v for k, v in values.items() if v is not None})
        main = step1_main if step == 1 else step2_main
        return run_main(main, [*arguments, *flags], monkeypatch, capsys)

    return run


def launch(program: str, *arguments, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a run.sh, or a Python program through utils/launch.py, from another directory."""
    with start(program, *arguments, processes=processes) as running:
        out, err = running.communicate(timeout=300)
    return subprocess.CompletedProcess(program, running.returncode, out, err)


def start(program: str, *arguments, processes: int = 2) -> subprocess.Popen:
    """The same without waiting for its end."""
    is_script = program.endswith(".sh")
    command = ["bash"] if is_script else [sys.executable, str(ROOT / "utils" / "launch.py")]
    return subprocess.Popen(
        [*command, str(ROOT / program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": str(processes)},
    )
