"""Operation counts against the published integers and against hand counts."""

import pytest
from torch import nn

from models import MODELS, build_model
from scripts.count_ops import count_layers, total
from utils.binarize import BinaryConv2d, Sign

RESNET_18 = 10_985_472, 137_793_536, 1_676_279_808
PUBLISHED = {  # binary layers; parameters, binary weights, FLOPs, BOPs
    "reactnet_a": (31, 29_343_592, 28_253_184, 11_862_016, 4_816_896_000),
    "reactnet_r18": (16, 11_704_424, *RESNET_18),
    "bireal_r18": (16, 11_689_512, *RESNET_18),
    "strong_baseline_r18": (16, 11_697_200, *RESNET_18),
    "real_to_binary_r18": (16, 11_991_600, 10_985_472, 138_087_936, 1_676_279_808),
    "meliusnet29": (48, 11_328_328, 10_321_920, 129_491_968, 5_469_585_408),
    "bcdnet_a": (55, 45_121_384, 43_981_824, 11_862_016, 4_816_896_000),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_have_the_parameters_and_operations_of_their_papers(name):
    counts = count_layers(build_model(name), 224)
    whole = total(counts)
    layers = sum(count.binary_weights > 0 for count in counts)
    summed = whole.parameters, whole.binary_weights, whole.flops, whole.bops
    assert (layers, *summed) == PUBLISHED[name]


def test_reactnet_a_has_the_published_operations_and_bytes():
    whole = total(count_layers(build_model("reactnet_a"), 224))
    assert whole.ops == 87_126_016
    assert round(whole.float_bytes / 1e6, 1) == 117.4
    assert round(whole.packed_bytes / 1e6, 2) == 7.89


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
        BinaryConv2d(4, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 5),
    )
    real, binary, linear = count_layers(model, 8)  # 8 -> 4 -> 2 pixels
    assert (real.flops, real.bops) == (3 * 9 * 4 * 16, 0)
    assert (binary.flops, binary.bops) == (0, 4 * 9 * 8 * 4)
    assert (linear.flops, linear.parameters) == (32 * 5, 32 * 5 + 5)
    assert binary.packed_bytes == 4 * 9 * 8 / 8
    assert model.training
