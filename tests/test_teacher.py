"""The teacher: torchvision networks, checkpoints trained here, and those that cannot be one."""

from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import CPU, config_with

from models.teacher import load_teacher
from utils.run.errors import UserError


def load(name: str | None, weights: str | None = None, num_classes: int = 3):
    config = config_with(teacher=name, teacher_checkpoint=weights, image_size=32)
    return load_teacher(config, num_classes, CPU)


def test_no_teacher_and_unknown_teachers():
    assert load(None) is None
    with pytest.raises(UserError, match="neither a torchvision network, nor a checkpoint"):
        load("resnet35")


def test_torchvision_teacher_from_a_file_is_frozen_and_in_eval_mode(tmp_path):
    reference = torchvision.models.resnet18(num_classes=3)
    path = tmp_path / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    generator_state = torch.get_rng_state()
    teacher = load("resnet18", str(path))
    assert torch.equal(torch.get_rng_state(), generator_state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(images), reference.eval()(images))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(UserError, match="has 3 classes and the data 10"):
        load("resnet18", str(path), num_classes=10)
    with pytest.raises(UserError, match="does not fit this ResNet"):
        load("resnet34", str(path))


def test_a_failed_download_names_the_option_for_a_file(monkeypatch):
    def no_network(name, weights):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(UserError, match="pass --teacher_checkpoint"):
        load("resnet34", num_classes=1000)


def test_a_teacher_that_cannot_compute_the_image_size_is_refused(run_step, monkeypatch):
    monkeypatch.setattr("models.teacher._build", lambda *_: torch.nn.Conv2d(3, 3, 99))
    result = run_step(1, teacher="resnet18")
    result.assert_one_sentence("the teacher resnet18 cannot compute images of 16 pixels", "Kernel")
