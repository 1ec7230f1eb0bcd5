"""Imports go one way: scripts -> steps -> models -> utils, and training knows no exporter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("scripts", "step1", "step2", "models", "utils", "tests")
# What the modules of a place may import of our own; the first place that fits a module counts.
ALLOWED = {
    "utils.binarize": ("utils.run.errors",),
    "utils.losses": ("utils.run.errors",),
    "utils.optim": ("utils.binarize", "utils.run.errors"),
    "utils.metrics": ("utils.binarize", "utils.run.errors"),
    "utils.engine": ("utils",),
    "utils.": ("utils.binarize", "utils.losses", "utils.optim", "utils.metrics", "utils.precision",
               "utils.data", "utils.checkpoint", "utils.run"),
    "models.export": ("models", "utils"),
    "models": ("models", "utils"),
    "step1": ("models", "utils"),
    "step2": ("models", "utils"),
    "scripts": ("scripts", "step1", "step2", "models", "utils"),
}  # fmt: skip
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for place in PACKAGES[:-1]
    for path in (ROOT / place).rglob("*.py")
    if "out" not in path.parts
}


def imported(path: Path) -> set[str]:
    """Our own modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    place = next(place for place in ALLOWED if f"{module}.".startswith(place))
    for name in imported(MODULES[module]):
        is_allowed = any(f"{name}.".startswith(f"{other}.") for other in ALLOWED[place])
        assert is_allowed, f"{module} imports {name}"
        if not module.startswith(("models.export", "scripts")):
            assert not name.startswith("models.export"), f"{module} imports {name}"


@pytest.mark.parametrize("step", [1, 2])
def test_training_loads_no_exporter(step):
    listing = (
        f"import sys; sys.argv = ['train.py']; import step{step}.train;"
        "print([name for name in sys.modules if 'export' in name and name.startswith('models')"
        " or name.split('.')[0] in ('openvino', 'onnx', 'onnxruntime')])"
    )
    run = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
