"""Precision, memory layout, compilation and accumulation change rounding and nothing else."""

import copy
import shutil

import pytest
import torch
from conftest import CPU, config_with
from torch import nn

from models import build_model
from utils.binarize import BinaryConv2d, RPReLU, Sign, channel_scale
from utils.engine import train_one_epoch
from utils.losses import batch_loss
from utils.optim import build_optimizer
from utils.precision import autocast, compiled, place
from utils.run.state import TrainState

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU needs g++"
)
COMPILED = config_with(compile=True)


def tiny(name: str = "reactnet_r18", **options) -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        name, num_classes=3, width=1 / 16, small_images=True, latent_init="symmetric", **options
    )


def batch(count: int = 6, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator, dtype=dtype)
    return images, torch.arange(count) % 3


def test_bfloat16_sums_of_signs_are_exact_and_only_the_output_is_rounded():
    torch.manual_seed(0)
    conv = BinaryConv2d(8, 6, 3, padding=1, bias=False, latent_init="symmetric")
    binary = torch.where(torch.randn(2, 8, 7, 7) < 0, -1.0, 1.0)
    exact = conv.double()(binary.double())
    with autocast(CPU, "bfloat16"):
        rounded = conv.float()(binary)
    assert rounded.dtype == torch.bfloat16
    # One rounding to 8 bits: the sums, of 72 terms, are whole numbers that bfloat16 holds.
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=1e-6)


def test_bfloat16_gradients_point_where_float32_gradients_do():
    images, _ = batch(32)
    gradients = []
    for precision in ("float32", "bfloat16"):
        conv = nn.Sequential(Sign(), BinaryConv2d(3, 4, 3, latent_init="symmetric"), RPReLU(4))
        torch.manual_seed(0)
        conv[1].reset_parameters()
        with autocast(CPU, precision):
            loss = conv(images).float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in conv.parameters() if p.grad is not None)
        gradients.append(conv[1].weight.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_the_residual_path_stays_in_float32_under_autocast():
    block = tiny().layer1[0]
    with autocast(CPU, "bfloat16"):
        assert block(torch.randn(2, 4, 8, 8)).dtype == torch.float32


def test_what_is_saved_for_the_backward_pass_is_saved_in_bfloat16():
    block = tiny().layer1[0]
    saved = []
    pack, unpack = lambda t: saved.append(t) or t, lambda t: t
    x = torch.randn(2, 4, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), autocast(CPU, "bfloat16"):
        block(x)
    assert {t.dtype for t in saved if t.shape == x.shape} == {torch.bfloat16}


def test_gradients_of_the_residual_path_stay_in_float32_under_autocast():
    x = torch.full((1, 1, 1, 1), -1.0, requires_grad=True)
    with autocast(CPU, "bfloat16"):
        y = RPReLU(1)(x)
    y.backward(torch.full_like(y, 1 + 2**-20))
    assert x.grad.dtype == torch.float32 and x.grad.item() == 0.25 * (1 + 2**-20)


@pytest.mark.parametrize(
    "fast", [{}, {"channels_last": True}, pytest.param({"compile": True}, marks=needs_compiler)]
)
def test_the_fused_update_is_the_elementary_one_in_every_memory_layout(fast):
    updated = []
    for fused in (True, False):
        recipe = {"learning_rate": 1e-2, "weight_decay": 1e-4, **fast}
        config = config_with(optimizer_options={"fused": fused}, **recipe)
        model = place(tiny().double(), config, CPU)
        optimizer = build_optimizer(model, config)
        batches = [batch(dtype=torch.float64)]
        train_one_epoch(compiled(model, config), None, batches, optimizer, config, TrainState())
        updated.append(model.state_dict())
    for name, mine in updated[0].items():
        torch.testing.assert_close(mine, updated[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["reactnet_a", "strong_baseline_r18"])
def test_channels_last_computes_the_same_in_float64(name):
    model = tiny(name).double()
    other = place(copy.deepcopy(model), config_with(channels_last=True), CPU)
    images, _ = batch(dtype=torch.float64)
    torch.testing.assert_close(model(images), other(images), rtol=1e-9, atol=1e-9)


@needs_compiler
def test_a_compiled_block_has_the_gradients_of_the_eager_one():
    block = tiny("reactnet_r18").layer2[0].double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    fast = compiled(block, COMPILED)
    inputs = (x, *block.parameters())
    results = [(y := f(x), torch.autograd.grad(y.square().sum(), inputs)) for f in (block, fast)]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert compiled(block, config_with(compile=False)) is block


@needs_compiler
def test_a_compiled_binary_convolution_has_the_bfloat16_numbers_of_the_eager_one():
    conv = BinaryConv2d(4, 6, 3, bias=False)
    x = torch.randn(2, 4, 8, 8).sign()
    with autocast(CPU, "bfloat16"):
        eager, fast = (f(x) for f in (conv, compiled(conv, COMPILED)))
    assert fast.dtype == torch.bfloat16 and torch.equal(fast, eager)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).double()


@pytest.mark.parametrize("teacher", [None, nn.Sequential(linear(), nn.Tanh())])
def test_accumulation_gives_loss_and_gradient_of_the_batch_where_there_is_no_bn(teacher):
    images, labels = batch(7, torch.float64)
    trained = []
    for accumulate in (1, 3):
        model, recipe = linear(), {"learning_rate": 1e-2, "label_smoothing": 0.1}
        loss = batch_loss(model(images), images, labels, teacher, 0.1).item()
        config = config_with(optimizer="SGD", accumulate=accumulate, **recipe)
        optimizer, state = build_optimizer(model, config), TrainState()
        results = train_one_epoch(model, teacher, [(images, labels)], optimizer, config, state)
        assert results["loss"] == pytest.approx(loss, rel=1e-12) and results["images"] == 7
        trained.append(model[1].weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-12)


def test_latent_scale_is_applied_after_the_convolution_in_bfloat16():
    conv = BinaryConv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(1 + 2**-7 + 2**-12)  # not a bfloat16
    with autocast(CPU, "bfloat16"):
        y = conv(torch.full((1, 1, 1, 1), -1.0))
    assert y.item() == -channel_scale(conv.weight.detach()).bfloat16().item()


def test_training_runs_in_bfloat16_channels_last_and_in_parts(run_step, tmp_path):
    fast = {"precision": "bfloat16", "channels_last": "true", "accumulate": 2}
    result = run_step(2, init_from="none", **fast)
    assert result.code == 0, result.err
    state = torch.load(tmp_path / "step2" / "model_best.pth.tar", weights_only=True)["state_dict"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert run_step(2, save=tmp_path / "other", precision="half").code == 2
