"""The fused functions and the deferred transforms against their elementary compositions."""

import pytest
import torch
from composed import binarize_weight as binarize_by_detaching
from composed import composed, sign_clip, sign_polynomial

from models import MODELS, build_model
from models.layers import AvgPool2x2
from utils import binarize
from utils.losses import soft_target_loss
from utils.optim import build_optimizer

SIGNS = {
    "polynomial": (binarize.sign_polynomial, sign_polynomial),
    "clip": (binarize.sign_clip, sign_clip),
}


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def leaves(*shapes, scale=1.5):
    torch.manual_seed(0)
    return [(scale * torch.randn(shape)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ste", SIGNS)
def test_rsign_has_the_composed_values_and_gradients(ste, layout):
    x, shift = leaves((4, 6, 5, 7), (1, 6, 1, 1))
    x = x.detach().to(memory_format=layout).requires_grad_()
    fused, elementary = SIGNS[ste]
    ours, theirs = fused(x, shift), elementary(x + shift)
    assert torch.equal(ours, theirs) and ours.is_contiguous(memory_format=layout)
    for mine, other in zip(gradients(ours, (x, shift)), gradients(theirs, (x, shift)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shifts", [False, True])
def test_rprelu_has_the_composed_values_and_gradients(shifts):
    x, before, after = leaves((4, 6, 5, 7), (1, 6, 1, 1), (1, 6, 1, 1))
    layer = binarize.RPReLU(6)
    layer.weight.data.uniform_(-0.5, 1.5)
    x.data[0, :, 0, 0] = -before[0, :, 0, 0] if shifts else 0.0  # as sums of +-1 often are
    inputs = (before, after) if shifts else ()
    ours = layer(x, *inputs)
    theirs = torch.nn.functional.prelu(x + before if shifts else x, layer.weight)
    theirs = theirs + after if shifts else theirs
    assert torch.equal(ours, theirs)
    parameters = (x, layer.weight, *inputs)
    for mine, other in zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_binary_convolution_has_the_composed_values_and_gradients(kernel, stride, padding):
    (x,) = leaves((2, 6, 9, 8))
    conv = binarize.BinaryConv2d(6, 4, kernel, stride, padding, bias=False, latent_init="symmetric")
    conv.weight.data.mul_(8)  # so that some latent weights are beyond 1
    assert (conv.weight.abs() > 1).any()
    ours = conv(x)
    kernel = binarize_by_detaching(conv.weight)
    theirs = torch.nn.functional.conv2d(x, kernel, None, stride, padding)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    inputs = (x, conv.weight)
    for mine, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (1, 1)])
def test_the_halving_pool_has_the_values_and_gradients_of_torchs_own(size, layout):
    (x,) = leaves((2, 3, *size))
    x = x.detach().to(memory_format=layout).requires_grad_()
    ours = AvgPool2x2()(x)
    theirs = torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    assert torch.equal(ours, theirs)
    assert torch.equal(gradients(ours, x)[0], gradients(theirs, x)[0])


def test_the_weight_binarizer_is_the_composed_one_to_a_rounding():
    (w,) = leaves((8, 4, 3, 3))
    torch.testing.assert_close(
        binarize.binarize_weight(w), binarize_by_detaching(w), rtol=3e-7, atol=0
    )


# Not StrongBaseline: there the sums of +-mean|w|, 0 to a rounding, meet the kink of a PReLU.
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"strong_baseline_r18"}))
def test_twenty_steps_in_float64_are_those_of_the_composed_network(name):
    torch.manual_seed(0)
    options = {"width": 1 / 16, "small_images": True, "latent_init": "symmetric"}
    model = build_model(name, num_classes=5, **options).double()
    other = composed(model)
    optimizers = [build_optimizer(m, 1e-2, 1e-4) for m in (model, other)]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
        targets = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        for network, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            soft_target_loss(network(images), targets).backward()
            optimizer.step()
    for (key, mine), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=key)


def test_only_inputs_are_kept_for_the_backward_pass():
    x, before, after = leaves((2, 6, 8, 8), (1, 6, 1, 1), (1, 6, 1, 1))
    layers = binarize.Sign(), binarize.RPReLU(6), binarize.BinaryConv2d(6, 6, 3, padding=1)
    sign, rprelu, conv = layers
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        binary = sign(x, before)
        y = conv(binary)
        rprelu(y, before, after)
    inputs = (x, before, after, binary, y, *(p for layer in layers for p in layer.parameters()))
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in inputs}
