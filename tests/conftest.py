"""A small image folder, and the two training programs run in this process."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from step1.train import main as step1_main
from step2.train import main as step2_main
from utils.data.shapes import draw_set

ROOT = Path(__file__).parents[1]
# On networks this small threads, also those of the programs that tests start, only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
CLASSES = ("bars", "disc", "star")
TRAIN, VAL = 8, 5  # images of each class
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


def write_images(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    draw_set(folder, classes, {"train": TRAIN, "val": VAL}, "{}.png")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Read only: tests that change images make their own with `write_images`."""
    return write_images(tmp_path_factory.mktemp("images"))


class Run:
    """How a training program ended: exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def assert_one_sentence(self, *words: str) -> None:
        """It failed with one line on stderr that holds all `words`, and no traceback."""
        assert self.code != 0
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.out + self.err
        for word in words:
            assert word in self.err, self.err


def run_main(main: Callable[[], None], arguments: list[str], monkeypatch, capsys) -> Run:
    """Run a program in this process and catch how it ends."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return Run(code, out, err)


@pytest.fixture
def run_script(monkeypatch, capsys) -> Callable[..., Run]:
    """Run `scripts/NAME.py` with the arguments given."""

    def run(name: str, *arguments) -> Run:
        main = importlib.import_module(f"scripts.{name}").main
        return run_main(main, list(arguments), monkeypatch, capsys)

    return run


@pytest.fixture
def run_step(monkeypatch, capsys, tmp_path, image_folder) -> Callable[..., Run]:
    """Run `step` 1 or 2 with the options TINY, those given laid over them; None drops one."""

    def run(step: int, *flags: str, **options) -> Run:
        values = {**TINY, "data": image_folder, "save": tmp_path / f"step{step}", **options}
        arguments = [
            text
            for name, value in values.items()
            if value is not None
            for text in (f"--{name}", value)
        ]
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
