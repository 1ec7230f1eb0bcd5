"""Loss surfaces, and the two binary nodes."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny
from torch import nn

from models import MODELS, build_model
from scripts.experiments import two_nodes
from scripts.experiments.surface import filter_normalised_direction, move_to, roughness
from utils import metrics
from utils.engine import evaluate


def direction_of(model: nn.Module, seed: int = 0):
    return filter_normalised_direction(model, torch.Generator().manual_seed(seed))


def test_a_direction_of_size_1_flips_a_quarter_of_gaussian_latent_signs():
    model = build_model("strong_baseline_r18")
    for weight in metrics.latent_weights(model).values():
        weight.normal_(std=0.1)
    before = metrics.signs(metrics.latent_weights(model))
    centre = copy.deepcopy(model.state_dict())
    direction = direction_of(model)
    move_to(model, centre, (direction, direction), 1.0, 0.0)
    after = metrics.signs(metrics.latent_weights(model))
    assert metrics.ff_ratio(before, after) == pytest.approx(0.25, abs=0.01)


def test_a_plane_is_not_rough_and_a_peak_is_as_rough_as_it_is_high():
    losses = np.add.outer(np.arange(5.0), 2 * np.arange(5.0))
    assert not roughness(losses).any()
    losses[2, 2] += 4
    expected = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]])
    assert np.array_equal(roughness(losses)[1:-1, 1:-1], expected)


@pytest.mark.parametrize("name", MODELS)
def test_each_filter_of_a_direction_is_as_long_as_the_networks_own(name):
    model = tiny(name)
    direction = direction_of(model)
    weights = dict(model.named_parameters())
    for key, values in direction.items():
        own = weights[key].detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(values.flatten(1).norm(dim=1), own)


def test_only_kernels_and_the_head_move():
    model = tiny()
    kernels = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert kernels | {"fc.weight"} == direction_of(model).keys()


def test_a_move_is_linear_and_the_centre_comes_back():
    model = tiny()
    centre = copy.deepcopy(model.state_dict())
    first, second = direction_of(model, 1), direction_of(model, 2)
    move_to(model, centre, (first, second), 0.5, -2.0)
    for name, value in model.state_dict().items():
        expected = centre[name]
        if name in first:
            expected = expected + 0.5 * first[name] - 2.0 * second[name]
        torch.testing.assert_close(value, expected)
    move_to(model, centre, (first, second), 0.0, 0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, centre[name])


def test_loss_and_top1_are_means_over_all_images():
    model = tiny()
    images, labels = torch.randn(12, 3, 16, 16), torch.randint(3, (12,))
    results = evaluate(model, zip(images.split(5), labels.split(5), strict=True)).results()
    logits = model.eval()(images)
    loss, hits = nn.functional.cross_entropy(logits, labels), logits.argmax(1) == labels
    assert results["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert results["top1"] == pytest.approx(100 * hits.double().mean().item())


def test_without_data_the_saturated_node_would_never_move():
    path = two_nodes.descend("Adam", 3e-3, {}, steps=50, noise=0.0, batch_size=1, seed=0)
    assert path[-1, 1] == two_nodes.START[1]
