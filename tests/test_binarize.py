"""Sign, its straight-through estimators and the weight binarizer against independent numpy."""

import doctest

import numpy as np
import pytest
import torch

from utils import binarize
from utils.binarize import BinaryConv2d, LatentConv2d, Sign, binarize_weight, sign
from utils.run.errors import UserError

EPS = np.finfo(np.float64).eps
POSITIVE = [0.0, EPS, 0.5, 1 - EPS, 1, 1 + EPS, 1.2999, 1.3001, 2, 1e30, np.inf]
BREAKPOINTS = np.array([*(-x for x in reversed(POSITIVE)), *POSITIVE])


def polynomial_gradient(x: np.ndarray) -> np.ndarray:
    """Bi-Real Net's piecewise form, written as the paper does."""
    rising = np.where((x >= -1) & (x < 0), 2 + 2 * x, 0)
    return np.where((x >= 0) & (x < 1), 2 - 2 * x, rising)


def clip_gradient(x: np.ndarray) -> np.ndarray:
    return ((x > -1) & (x < 1)).astype(x.dtype)


def wide_clip_gradient(x: np.ndarray) -> np.ndarray:
    return (abs(x) <= 1.3).astype(x.dtype)


GRADIENTS = {
    "polynomial": polynomial_gradient,
    "clip": clip_gradient,
    "clip_1.3": wide_clip_gradient,
}


@pytest.mark.parametrize("ste", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sign_and_its_gradient_match_numpy_at_every_breakpoint(ste, dtype):
    x = torch.tensor(BREAKPOINTS, dtype=dtype, requires_grad=True)
    y = sign(x, ste=ste)
    upstream = torch.arange(1, len(BREAKPOINTS) + 1, dtype=dtype)
    y.backward(upstream)
    rounded = x.detach().numpy()
    with np.errstate(invalid="ignore"):
        expected = GRADIENTS[ste](rounded) * upstream.numpy()
    np.testing.assert_array_equal(y.detach().numpy(), np.where(rounded < 0, -1, 1))
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    assert y.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("ste", GRADIENTS)
def test_a_tensor_used_twice_adds_both_gradients(ste):
    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64, requires_grad=True)
    (3 * sign(x, ste=ste) + sign(x, ste=ste) * x).sum().backward()
    at = x.detach().numpy()
    gradient, sign_at = GRADIENTS[ste](at), np.where(at < 0, -1.0, 1.0)
    np.testing.assert_allclose(x.grad, 3 * gradient + gradient * at + sign_at, atol=1e-15)


@pytest.mark.parametrize("ste", GRADIENTS)
def test_sign_has_two_values_in_bfloat16(ste):
    x = torch.randn(1000, dtype=torch.bfloat16)
    y = sign(torch.cat([x, torch.zeros(2, dtype=torch.bfloat16)]), ste=ste)
    assert y.dtype == torch.bfloat16
    assert set(y.tolist()) == {-1.0, 1.0}


def test_weight_binarizer_matches_numpy():
    w = torch.tensor(BREAKPOINTS[2:-2].reshape(2, 1, 1, 9), requires_grad=True)
    y = binarize_weight(w)
    upstream = torch.arange(1.0, 19.0, dtype=torch.float64).reshape(w.shape)
    y.backward(upstream)
    at = w.detach().numpy()
    scale = np.abs(at).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(y.detach(), scale * np.where(at < 0, -1, 1), rtol=1e-15)
    np.testing.assert_array_equal(w.grad, upstream.numpy() * (np.abs(at) <= 1))


def test_a_binary_convolution_gives_its_weights_the_binarizers_gradient():
    conv = BinaryConv2d(1, 2, (1, 9)).double()
    conv.weight.data = torch.tensor(BREAKPOINTS[2:-2].reshape(2, 1, 1, 9))
    x = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 1, 9)
    conv(x).sum().backward()
    at = conv.weight.detach()
    torch.testing.assert_close(conv.weight.grad, x * (at.abs() <= 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_binarizer_leaves_one_magnitude_per_output_channel(dtype):
    y = binarize_weight(torch.randn(16, 8, 3, 3, dtype=dtype))
    assert all(len(channel.abs().unique()) == 1 for channel in y)
    assert y.dtype == dtype


def test_channel_of_zeros_is_binarized_to_zeros():
    assert binarize_weight(torch.zeros(1, 2, 3, 3)).abs().max() == 0


def test_latent_weights_start_positive_as_released_or_symmetric():
    positive = BinaryConv2d(32, 32, 3).weight
    assert positive.min() >= 0 and positive.max() <= 0.001
    symmetric = BinaryConv2d(32, 32, 3, latent_init="symmetric").weight
    assert 0.45 < (symmetric > 0).float().mean() < 0.55


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(UserError, match="polynomial, clip"):
        Sign("swish")
    with pytest.raises(UserError, match="positive, symmetric"):
        BinaryConv2d(1, 1, 1, latent_init="zero")


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding_mode": "reflect"}])
@pytest.mark.parametrize("convolution", [LatentConv2d, BinaryConv2d])
def test_both_steps_refuse_a_padding_that_binary_weights_cannot_have(convolution, padding):
    with pytest.raises(UserError, match="zeros"):
        convolution(4, 4, 3, **padding)


def test_doctests_hold():
    results = doctest.testmod(binarize)
    assert results.attempted and not results.failed
