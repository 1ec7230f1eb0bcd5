"""Measures against values counted by hand."""

import pytest
import torch
from torch import nn

from models import MODELS, build_model
from utils import measures
from utils.binarize import Sign
from utils.run.errors import UserError


def layers(*rows):
    return {f"layer{i}": torch.tensor(row) for i, row in enumerate(rows)}


def test_flip_flop_ratio_counts_changed_signs_over_all_layers():
    before = measures.signs(layers([0.5, -0.5, 0.0, -0.0], [1.0, -1.0]))
    after = measures.signs(layers([-0.5, -0.1, -1e-9, 3.0], [1.0, 1.0]))
    assert measures.ff_ratio(before, before) == 0
    assert measures.ff_ratio(before, after) == 3 / 6  # +- 0 count as +1


def test_c2i_is_one_for_unchanged_signs_zero_for_all_flipped_and_literal_never_below_half():
    first = measures.signs(layers([1.0, -1.0, 1.0, -1.0]))
    last = measures.signs(layers([1.0, -1.0, -1.0, -1.0]))
    opposite = {name: ~sign for name, sign in first.items()}
    assert measures.c2i_ratio(first, last) == 0.75
    assert measures.c2i_ratio(first, last, literal=True) == 0.875
    assert (measures.c2i_ratio(first, first), measures.c2i_ratio(first, opposite)) == (1, 0)
    assert measures.c2i_ratio(first, opposite, literal=True) == 0.5


def test_cam_and_sdam_of_a_hand_made_kernel():
    weight = torch.tensor([[1.0, -3.0], [0.0, 4.0], [-5.0, 5.0]]).reshape(3, 2, 1, 1)
    assert measures.channel_absolute_mean(weight).tolist() == [2, 2, 5]
    assert measures.deviation_of_absolute_means(weight) == pytest.approx(2**0.5)


def test_share_above_and_saturation_leave_the_bound_out():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.0001])
    assert measures.saturation(x) == pytest.approx(2 / 5)
    assert measures.share_above(x, 0.5) == pytest.approx(4 / 5)


def test_histogram_counts_every_weight_once_and_outliers_at_the_ends():
    weight = torch.tensor([-9.0, -0.9, -0.1, 0.1, 0.1, 9.0])
    assert measures.histogram(weight, bins=4, limit=1.0).tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("binary_weights", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_latent_weights_are_those_of_the_binary_layers_in_both_steps(name, binary_weights):
    with torch.device("meta"):
        model = build_model(name, binary_weights=binary_weights)
    found = measures.latent_weights(model)
    assert len(found) == (31 if name == "reactnet_a" else 16)
    assert sum(w.numel() for w in found.values()) == (
        28_253_184 if name == "reactnet_a" else 10_985_472
    )


def test_saturation_is_measured_where_each_sign_looks():
    model = nn.Sequential(nn.Identity(), Sign(), nn.BatchNorm2d(1), Sign())
    model[2].bias.data.fill_(5.0)
    images = torch.tensor([-2.0, -0.5, 0.5, 0.7]).reshape(1, 1, 2, 2)
    model.train()
    found = measures.saturation_by_layer(model, images)
    assert found == {"1": 0.25, "3": 1.0}
    assert model.training and not model[1]._forward_pre_hooks
    assert model[2].num_batches_tracked == 0


def test_networks_without_binary_layers_say_so():
    with pytest.raises(UserError, match="no layers with latent weights"):
        measures.latent_weights(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no binary activations"):
        measures.saturation_by_layer(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 2, 2))
