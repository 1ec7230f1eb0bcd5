"""Operation counts against the published integers and against hand counts."""

import pytest
from torch import nn

from models import build_model
from scripts.count_ops import count_layers, total
from utils.binarize import BinaryConv2d, Sign


def test_reactnet_a_has_the_published_counts():
    counts = count_layers(build_model("reactnet_a"), 224)
    whole = total(counts)
    assert whole.parameters == 29_343_592
    assert whole.binary_weights == 28_253_184
    assert sum(count.binary_weights > 0 for count in counts) == 31
    assert (whole.flops, whole.bops) == (11_862_016, 4_816_896_000)
    assert whole.ops == 87_126_016
    assert round(whole.float_bytes / 1e6, 1) == 117.4
    assert round(whole.packed_bytes / 1e6, 2) == 7.89


@pytest.mark.parametrize("name", ["reactnet_r18", "bireal_r18", "strong_baseline_r18"])
def test_resnet_18_networks_have_the_published_operations(name):
    counts = count_layers(build_model(name), 224)
    whole = total(counts)
    assert (whole.flops, whole.bops) == (137_793_536, 1_676_279_808)
    assert whole.ops == 163_985_408
    assert whole.binary_weights == 10_985_472
    assert sum(count.binary_weights > 0 for count in counts) == 16
    if name == "reactnet_r18":
        assert whole.parameters == 11_704_424


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [
        ("real_to_binary_r18", 16, (11_991_600, 10_985_472, 138_087_936, 1_676_279_808)),
        ("meliusnet29", 48, (11_328_328, 10_321_920, 129_491_968, 5_469_585_408)),
        ("bcdnet_a", 55, (45_121_384, 43_981_824, 11_862_016, 4_816_896_000)),
    ],
)
def test_networks_after_reactnet_have_the_parameters_and_operations_of_their_papers(
    name, layers, counts
):
    per_layer = count_layers(build_model(name), 224)
    whole = total(per_layer)
    assert (whole.parameters, whole.binary_weights, whole.flops, whole.bops) == counts
    assert sum(count.binary_weights > 0 for count in per_layer) == layers


@pytest.mark.parametrize(("activations", "weights"), [(True, False), (False, True)])
def test_an_operation_is_binary_only_when_both_operands_are(activations, weights):
    model = build_model(
        "reactnet_a", binary_activations=activations, binary_weights=weights, width=0.125
    )
    assert total(count_layers(model, 32)).bops == 0


def test_layers_are_counted_at_the_size_they_see():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        Sign(),
        BinaryConv2d(4, 8, 3, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 5),
    )
    real, binary, linear = count_layers(model, 8)  # 8 -> 4 -> 2 pixels
    assert (real.flops, real.bops) == (3 * 9 * 4 * 16, 0)
    assert (binary.flops, binary.bops) == (0, 4 * 9 * 8 * 4)
    assert (linear.flops, linear.parameters) == (32 * 5, 32 * 5 + 5)
    assert binary.packed_bytes == 4 * 9 * 8 / 8
    assert model.training
