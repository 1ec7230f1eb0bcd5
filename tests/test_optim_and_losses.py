"""Decay groups, learning-rate schedules, and the two losses."""

import pytest
import torch
import torch.nn.functional as F
from conftest import config_with

from models import build_model
from utils.binarize import BinaryConv2d
from utils.losses import batch_loss, soft_target_loss
from utils.metrics import ff_ratio, latent_weights, signs
from utils.optim import build_optimizer, describe_groups, set_learning_rate
from utils.run.errors import UserError


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return build_model("reactnet_a")


def test_released_group_decays_convolutions_and_all_78_shifts(model):
    optimizer = build_optimizer(model, config_with(weight_decay=5e-6))
    other, decayed = optimizer.param_groups
    assert (other["weight_decay"], decayed["weight_decay"]) == (0, 5e-6)
    assert (len(other["params"]), len(decayed["params"])) == (92, 110)
    described = describe_groups(optimizer)
    assert "110 tensors (28,285,792 values) with weight decay 5e-06" in described


def test_textbook_group_decays_convolutions_alone(model):
    config = config_with(weight_decay=5e-6, decay_group="convolutions")
    _, decayed = build_optimizer(model, config).param_groups
    assert len(decayed["params"]) == 110 - 78
    assert all(p.shape[0] != 1 for p in decayed["params"])


def test_weight_decay_is_coupled_l2():
    conv = torch.nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(2.0)
    conv.weight.grad = torch.zeros_like(conv.weight)
    build_optimizer(conv, config_with(learning_rate=0.1, weight_decay=0.01)).step()
    # Coupled, the decay is the whole gradient and Adam's first step has the size of the rate.
    torch.testing.assert_close(conv.weight.item(), 1.9, rtol=1e-6, atol=0)


def test_other_optimizers_are_built_by_name_with_their_options():
    conv = torch.nn.Conv2d(1, 1, 1)
    momentum = {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}}
    sgd = build_optimizer(conv, config_with(weight_decay=1e-4, **momentum))
    assert type(sgd) is torch.optim.SGD
    assert [(g["momentum"], g["weight_decay"]) for g in sgd.param_groups] == [(0.9, 0), (0.9, 1e-4)]
    betas = {"betas": [0.8, 0.9]}
    adam = build_optimizer(conv, config_with(weight_decay=-1e-4, optimizer_options=betas))
    assert tuple(adam.defaults["betas"]) == (0.8, 0.9)
    assert adam.param_groups[1]["weight_decay"] == -1e-4


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Adamm", {}, "unknown optimizer 'Adamm'"),
        ("Adam", {"momentum": 0.9}, "optimizer Adam with .* cannot be built"),
        ("SparseAdam", {}, "knows no weight decay"),
        ("Adam", {"weight_decay": 0.1}, "has weight_decay: set learning_rate and weight_decay"),
        ("Adam", {"betas": [0.9]}, "optimizer Adam with .* cannot be built: list index"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_one_sentence(name, options, words):
    with pytest.raises(UserError, match=words):
        config = config_with(optimizer=name, optimizer_options=options)
        build_optimizer(torch.nn.Conv2d(1, 1, 1), config)


def rates(epochs: int, **options) -> list[float]:
    config = config_with(epochs=epochs, **options)
    optimizer = build_optimizer(torch.nn.Conv2d(1, 1, 1), config)
    rates = []
    for epoch in range(epochs):
        rates.append(set_learning_rate(optimizer, epoch, config))
        assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
    return rates


def test_released_schedule_never_uses_the_base_rate_and_ends_at_zero():
    released = rates(256, learning_rate=1.25e-3)
    assert released[0] == 1.25e-3 * 255 / 256
    assert released[-1] == 0
    torch.testing.assert_close(torch.tensor(released).diff(), torch.full((255,), -1.25e-3 / 256))


def test_textbook_and_cosine_schedules_start_at_the_base_rate():
    assert rates(4, learning_rate=1.0, schedule="textbook") == [1.0, 0.75, 0.5, 0.25]
    cosine = rates(4, learning_rate=1.0, schedule="cosine")
    assert cosine == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_soft_target_loss_has_the_gradient_of_kl_and_ends_at_the_teachers_entropy():
    torch.manual_seed(0)
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad(soft_target_loss(student, teacher), student)
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    (expected,) = torch.autograd.grad(kl, student)
    torch.testing.assert_close(ours, expected)
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft_target_loss(teacher + 5, teacher), entropy)


def test_without_teacher_the_loss_is_label_cross_entropy_with_smoothing():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    images = torch.zeros(5, 3, 2, 2)
    log_p = logits.log_softmax(1)
    plain = -log_p[torch.arange(5), labels].mean()
    torch.testing.assert_close(batch_loss(logits, images, labels, None, 0.0), plain)
    smooth = 0.9 * plain + 0.1 * -log_p.mean()
    torch.testing.assert_close(batch_loss(logits, images, labels, None, 0.1), smooth)


def test_with_teacher_labels_do_not_count_and_the_teacher_gets_no_gradient():
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    images, logits = torch.randn(5, 3, 2, 2), torch.randn(5, 4, requires_grad=True)
    losses = [batch_loss(logits, images, torch.full((5,), label), teacher, 0.0) for label in (0, 3)]
    assert losses[0] == losses[1]
    losses[0].backward()
    assert teacher[1].weight.grad is None and logits.grad.abs().sum() > 0


def test_latent_weights_may_have_a_rate_and_a_scale_of_their_own():
    options = {"num_classes": 3, "width": 1 / 16, "latent_init": "symmetric"}
    torch.manual_seed(0)
    plain = build_model("reactnet_r18", **options)
    torch.manual_seed(0)
    scaled = build_model("reactnet_r18", latent_scale=0.25, **options)
    latent = latent_weights(plain)
    for (name, value), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        is_latent = name.removesuffix(".weight") in latent
        torch.testing.assert_close(other, value * 0.25 if is_latent else value)

    config = config_with(latent_rate=0.5, weight_decay=1e-4, epochs=2, schedule="textbook")
    optimizer = build_optimizer(scaled, config)
    assert set_learning_rate(optimizer, 1, config) == 5e-4
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(5e-4, 0.0), (5e-4, 1e-4), (2.5e-4, 1e-4)]
    own = {id(weight) for weight in optimizer.param_groups[2]["params"]}
    assert len(own) == len(latent)
    assert own == {id(scaled.get_submodule(name).weight) for name in latent}


class ConvBN(torch.nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        torch.manual_seed(0)
        self.binary_conv = BinaryConv2d(3, 8, 3, latent_init="symmetric")
        self.binary_conv.weight.data.mul_(scale)
        self.bn = torch.nn.BatchNorm2d(8, eps=1e-15)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.binary_conv(x.sign())).mean((2, 3))


def test_rate_decay_and_scale_in_step_change_no_sign_where_bn_stands_behind():
    """What `scripts/experiments/beyond1.yaml` builds on: rate c, decay 1 / c^2, scale c."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 8, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(8, (5, 8), generator=generator)

    def trained(scale: float, rate: float, decay: float):
        model = ConvBN(scale)
        first = signs(latent_weights(model))
        rates = {"latent_rate": rate, "learning_rate": 1e-2, "epochs": 1}
        config = config_with(weight_decay=decay, decay_group="latent", schedule="textbook", **rates)
        optimizer = build_optimizer(model, config)
        set_learning_rate(optimizer, 0, config)
        for x, y in zip(images, labels, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return first, signs(latent_weights(model))

    first, base = trained(0.5, 0.5, 1e-2)
    _, matched = trained(0.25, 0.25, 4e-2)
    _, rate_alone = trained(0.5, 0.25, 1e-2)
    assert ff_ratio(first, base) > 0.05
    assert ff_ratio(base, matched) == 0 < ff_ratio(base, rate_alone)
