"""The autograd functions against their elementary compositions in `models.reference`."""

import pytest
import torch
from conftest import config_with, narrow
from torch import nn

from models import MODELS, build_model, reference
from models.layers import AvgPool2x2
from utils import binarize
from utils.binarize import binary_convolutions
from utils.losses import soft_target_loss
from utils.optim import build_optimizer

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def leaves(device, *shapes, layout=torch.contiguous_format):
    torch.manual_seed(0)
    values = [1.5 * torch.randn(shape) for shape in shapes]
    return [value.to(device, memory_format=layout).requires_grad_() for value in values]


def assert_as_reference(layer, *inputs, value_tolerance=0.0, gradient_tolerance=1e-5):
    """`layer` has the values of its reference and the gradients of inputs and parameters."""
    if inputs[0].is_cuda:  # its sums, of up to 150 terms of size 1, have an order of their own
        value_tolerance, gradient_tolerance = 10 * value_tolerance, 10 * gradient_tolerance
    layer = layer.to(inputs[0].device)
    other = reference.to_reference(layer)
    assert type(other) is not type(layer)
    results = []
    for module in (layer, other):
        output = module(*inputs)
        torch.manual_seed(1)
        upstream = torch.randn_like(output)
        results.append((output, [*inputs, *module.parameters()], upstream))
    ours, theirs = (output for output, *_ in results)
    torch.testing.assert_close(ours, theirs, rtol=value_tolerance / 10, atol=value_tolerance)
    for pair in zip(*(torch.autograd.grad(*result) for result in results), strict=True):
        torch.testing.assert_close(*pair, rtol=gradient_tolerance / 10, atol=gradient_tolerance)
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ste", binarize.ACTIVATION_STES)
def test_rsign_has_the_reference_values_and_gradients(device, ste, layout):
    x, shift = leaves(device, (4, 6, 5, 7), (1, 6, 1, 1), layout=layout)
    y = assert_as_reference(binarize.Sign(ste), x, shift)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shifts", [False, True])
def test_rprelu_has_the_reference_values_and_gradients(device, shifts):
    x, before, after = leaves(device, (4, 6, 5, 7), (1, 6, 1, 1), (1, 6, 1, 1))
    layer = binarize.RPReLU(6)
    layer.weight.data.uniform_(-0.5, 1.5)
    x.data[0, :, 0, 0] = -before[0, :, 0, 0] if shifts else 0.0  # as sums of +-1 often are
    assert_as_reference(layer, x, *((before, after) if shifts else ()))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_binary_convolution_has_the_reference_values_and_gradients(device, kernel, stride, padding):
    conv = binarize.BinaryConv2d(6, 4, kernel, stride, padding, latent_init="symmetric")
    conv.weight.data.mul_(8)  # so that some latent weights are beyond 1
    assert (conv.weight.abs() > 1).any()
    assert_as_reference(conv, *leaves(device, (2, 6, 9, 8)), value_tolerance=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (1, 1)])
def test_average_pooling_has_the_values_and_gradients_of_torchs_own(device, size, layout):
    inputs = leaves(device, (2, 3, *size), layout=layout)
    assert_as_reference(AvgPool2x2(), *inputs, gradient_tolerance=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_float64_are_those_of_the_reference_network(name, device):
    torch.manual_seed(0)
    options = {"width": narrow(name, 1 / 8), "small_images": True, "latent_init": "symmetric"}
    model = build_model(name, num_classes=5, **options).double()
    for conv in binary_convolutions(model).values():
        # Scales that are powers of 2 make all sums exact: where one is 0, or the largest of a
        # window twice, it is so in both networks.
        exponents = torch.randint(-6, 0, (len(conv.weight), 1, 1, 1)).double()
        conv.weight.data = conv.weight.data.sign() * exponents.exp2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)  # else a value that is the mean meets Sign(0)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(device)
    model.to(device)
    logits, gradients = [], []
    for network in (model, reference.to_reference(model)):
        logits.append(network(images))
        gradients.append(torch.autograd.grad(logits[-1].square().sum(), network.parameters()))
    torch.testing.assert_close(*logits, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * theirs.norm().item())


# Not where sums that are 0, or equal, to a rounding meet the kink of a PReLU or a max pooling.
@pytest.mark.parametrize("name", ["bcdnet_a", "bireal_r18", "reactnet_a", "reactnet_r18"])
def test_twenty_steps_in_float64_are_those_of_the_reference_network(name, device):
    torch.manual_seed(0)
    options = {"width": 1 / 16, "small_images": True, "latent_init": "symmetric"}
    model = build_model(name, num_classes=5, **options).double().to(device)
    other = reference.to_reference(model)
    config = config_with(learning_rate=1e-2, weight_decay=1e-4)
    optimizers = [build_optimizer(network, config) for network in (model, other)]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
        targets = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        for network, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            soft_target_loss(network(images.to(device)), targets.to(device)).backward()
            optimizer.step()
    for (key, mine), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=key)


def test_only_inputs_are_saved_for_the_backward_pass():
    x, before, after = leaves("cpu", (2, 6, 8, 8), (1, 6, 1, 1), (1, 6, 1, 1))
    layers = binarize.Sign(), binarize.RPReLU(6), binarize.BinaryConv2d(6, 6, 3, padding=1)
    sign, rprelu, conv = layers
    saved = []
    pack, unpack = lambda t: saved.append(t) or t, lambda t: t
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        binary = sign(x, before)
        y = conv(binary)
        rprelu(y, before, after)
    inputs = (x, before, after, binary, y, *(p for layer in layers for p in layer.parameters()))
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in inputs}
