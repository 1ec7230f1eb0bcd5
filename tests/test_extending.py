"""The examples of docs/extending.md and docs/faq.md, taken from the pages and run."""

import re
from importlib.util import find_spec

import pytest
import torch
from conftest import FROM_SCRATCH, ROOT

import models
from scripts.experiments import spec
from utils import binarize, optim


def example(
    heading: str, language: str = "python", page: str = "extending", number: int = 0
) -> str:
    """A code block of a language below a heading of a page in docs/."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[number]


def run_in_module(code: str, module, registry: dict, name: str, monkeypatch) -> None:
    """Run code as if it stood in a module; what it registers is taken back after the test."""
    monkeypatch.setitem(registry, name, None)
    exec(code, dict(vars(module)))
    assert registry[name]


def test_a_new_estimator_trains(run_step, monkeypatch):
    code = example("A new estimator")
    run_in_module(code, binarize, binarize.ACTIVATION_STES, "tanh", monkeypatch)
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    binarize.sign(x, ste="tanh").sum().backward()
    assert torch.equal(x.grad, 1 - torch.tanh(x.detach()) ** 2)
    result = run_step(2, activation_ste="tanh", epochs=1, **FROM_SCRATCH)
    assert result.code == 0, result.err


def test_a_new_network_trains_in_both_steps_and_is_converted(
    run_step, run_script, tmp_path, monkeypatch
):
    names = {}
    exec(example("A new network"), names)
    monkeypatch.setitem(models.MODELS, "two_blocks", names["TwoBlocks"])
    on_latent_weights = {"decay_group": "latent", "latent_rate": 0.5}
    first = run_step(1, model="two_blocks", **on_latent_weights)
    assert "0 tensors (0 values) with weight decay 5e-06; 2 tensors (72 values)" in first.out
    best = tmp_path / "step1" / "model_best.pth.tar"
    assert run_step(2, model="two_blocks", init_from=best).code == 0
    trained = tmp_path / "step2" / "model_best.pth.tar"
    assert "two_blocks" in run_script("inspect_checkpoint", trained).out
    forms = {"exact": "exact.pth.tar", "packed": "packed.safetensors", "openvino": "bits.xml"}
    if not find_spec("openvino"):
        del forms["openvino"]
    for form, name in forms.items():
        converted = run_script("convert", trained, "--to", form, "--output", tmp_path / name)
        assert converted.code == 0, converted.err
        assert "predictions equal" in converted.out


def test_a_new_schedule_sets_the_rates(run_step, monkeypatch):
    code = example("A new optimizer or training strategy")
    run_in_module(code, optim, optim.SCHEDULES, "exponential", monkeypatch)
    result = run_step(1, schedule="exponential", epochs=2, learning_rate=0.01)
    assert "epoch 1: learning rate 1.000e-03" in result.out, result.err


def test_a_new_optimizer_trains(run_step, monkeypatch):
    code = example("A new optimizer or training strategy", number=1)
    monkeypatch.setattr(torch.optim, "SignSGD", None, raising=False)
    exec(code, dict(vars(optim)))
    result = run_step(1, optimizer="SignSGD", weight_decay=1e-2)
    assert result.code == 0, result.err


def test_the_layers_make_a_network_of_ones_own(monkeypatch):
    monkeypatch.setitem(binarize.ACTIVATION_STES, "tanh", None)
    names = {}
    exec(example("How do I use the layers in my own network?", page="faq"), names)
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    names["block"](x).sum().backward()
    assert x.grad.any()
    assert names["network"].eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("scale", ["quick", "small"])
def test_a_new_experiment_resolves_to_its_runs(tmp_path, monkeypatch, scale):
    monkeypatch.setattr(spec, "EXPERIMENTS", tmp_path)
    (tmp_path / "estimators.yaml").write_text(example("A new experiment", "yaml"))
    (tmp_path / "scales").symlink_to(ROOT / "scripts" / "experiments" / "scales")
    experiment = spec.read_experiment("estimators", scale)
    runs = spec.resolve_runs(experiment, scale, seeds=range(1), out=tmp_path / "runs", options=[])
    assert [(run.name, run.config.activation_ste) for run in runs] == [
        ("clip", "clip"),
        ("polynomial", "polynomial"),
    ]
