"""Precision, memory layout, compilation and accumulation change rounding and nothing else."""

import copy
import functools
import itertools
import shutil

import pytest
import torch
from conftest import CPU, config_with, tiny
from torch import nn

from models.layers import NetworkOptions
from models.reference import to_reference
from utils.binarize import BinaryConv2d, RPReLU, Sign
from utils.engine import train_one_epoch
from utils.losses import batch_loss
from utils.optim import build_optimizer
from utils.precision import PRECISIONS, autocast, compiled, place, set_precision
from utils.run.state import TrainState

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU needs g++"
)
COMPILED = config_with(compile=True)


def batch(count: int = 6, dtype: torch.dtype = torch.float32, device: torch.device = CPU):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator, dtype=dtype)
    return images.to(device), (torch.arange(count) % 3).to(device)


def test_bfloat16_sums_of_signs_are_exact_and_only_the_output_is_rounded(device):
    torch.manual_seed(0)
    conv = BinaryConv2d(8, 6, 3, padding=1, latent_init="symmetric").to(device)
    binary = torch.where(torch.randn(2, 8, 7, 7) < 0, -1.0, 1.0).to(device)
    exact = conv.double()(binary.double())
    with autocast(device, "bfloat16"):
        rounded = conv.float()(binary)
    assert rounded.dtype == torch.bfloat16
    # One rounding to 8 bits: the sums, of 72 terms, are whole numbers that bfloat16 holds.
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("binary_activations", [True, False])
def test_float32_sums_of_signs_and_no_others_are_rounded_to_whole_numbers(
    device, binary_activations
):
    torch.manual_seed(0)
    options = NetworkOptions(binary_activations=binary_activations, latent_init="symmetric")
    layers = nn.Sequential(options.sign(), options.conv(64, 64, 3, padding=1)).to(device)
    layers[1].weight.data.sign_()  # of scale 1
    x = torch.randn(8, 64, 14, 14, device=device)
    y, exact = layers(x), layers.double()(x.double())
    assert torch.equal(y, y.round()) == binary_activations
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0 if binary_activations else 1e-4)
    assert not binary_activations or (y == 0).any()


@pytest.mark.parametrize("low", ["bfloat16", "bfloat16_residual"])
def test_bfloat16_gradients_point_where_float32_gradients_do(low, device):
    images, _ = batch(32, device=device)
    gradients = []
    for precision in ("float32", low):
        conv = nn.Sequential(Sign(), BinaryConv2d(3, 4, 3, latent_init="symmetric"), RPReLU(4))
        torch.manual_seed(0)
        conv[1].reset_parameters()
        place(conv, config_with(precision=precision), device)
        with autocast(device, precision):
            loss = conv(images).float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in conv.parameters() if p.grad is not None)
        gradients.append(conv[1].weight.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_the_residual_path_stays_in_float32_under_autocast(device):
    block = tiny().layer1[0].to(device)
    with autocast(device, "bfloat16"):
        assert block(torch.randn(2, 4, 8, 8).to(device)).dtype == torch.float32


def test_bfloat16_residual_computes_it_and_its_gradient_in_bfloat16(device):
    precision = "bfloat16_residual"
    block = place(tiny().layer1[0], config_with(precision=precision), device)
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    with autocast(device, precision):
        y = block(x)
    y.float().square().mean().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_what_is_saved_for_the_backward_pass_is_saved_in_bfloat16(device):
    block = tiny().layer1[0].to(device)
    saved = []
    pack, unpack = lambda t: saved.append(t) or t, lambda t: t
    x = torch.randn(2, 4, 8, 8).to(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), autocast(device, "bfloat16"):
        block(x)
    assert {t.dtype for t in saved if t.shape == x.shape} == {torch.bfloat16}


def test_gradients_of_the_residual_path_stay_in_float32_under_autocast(device):
    x = torch.full((1, 1, 1, 1), -1.0, requires_grad=True, device=device)
    with autocast(device, "bfloat16"):
        y = RPReLU(1).to(device)(x)
    y.backward(torch.full_like(y, 1 + 2**-20))
    assert x.grad.dtype == torch.float32 and x.grad.item() == 0.25 * (1 + 2**-20)


@pytest.mark.parametrize(
    "fast", [{}, {"channels_last": True}, pytest.param({"compile": True}, marks=needs_compiler)]
)
def test_the_fused_update_is_the_elementary_one_in_every_memory_layout(device, fast):
    updated = []
    for fused in (True, False):
        recipe = {"learning_rate": 1e-2, "weight_decay": 1e-4, **fast}
        config = config_with(optimizer_options={"fused": fused}, **recipe)
        model = place(tiny().double(), config, device)
        optimizer = build_optimizer(model, config)
        batches = [batch(dtype=torch.float64, device=device)]
        train_one_epoch(compiled(model, config), None, batches, optimizer, config, TrainState())
        updated.append(model.state_dict())
    for name, mine in updated[0].items():
        torch.testing.assert_close(mine, updated[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["reactnet_a", "strong_baseline_r18"])
def test_channels_last_computes_the_same_in_float64(name, device):
    model = tiny(name).double().to(device)
    other = place(copy.deepcopy(model), config_with(channels_last=True), device)
    images, _ = batch(dtype=torch.float64, device=device)
    torch.testing.assert_close(model(images), other(images), rtol=1e-9, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "part"), [("reactnet_r18", "layer2.0"), ("reactnet_a", "feature.1")]
)
def test_a_compiled_block_computes_what_the_eager_one_does(name, part, device):
    block = tiny(name).get_submodule(part).double().to(device)
    other = copy.deepcopy(block)
    assert compiled(block, config_with(compile=False)) is block
    channels = next(block.parameters()).shape[1]
    for size in (8, 128):  # small and large images
        x = torch.randn(2, channels, size, size, dtype=torch.float64).to(device).requires_grad_()
        results = []
        for module, f in ((block, block), (other, compiled(other, COMPILED))):
            y = f(x)
            gradients = torch.autograd.grad(y.square().mean(), (x, *module.parameters()))
            results.append((y, *gradients, *module.buffers()))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_each_size_of_a_batch_is_compiled_for_student_and_teacher_alike(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for model in (tiny().eval(), tiny("strong_baseline_r18").eval()):  # of one forward method
        fast = compiled(model, COMPILED)
        for count in range(1, 6):
            fast(batch(count)[0])
    assert counters["stats"]["unique_graphs"] == 10


@needs_compiler
def test_a_compiled_binary_convolution_has_the_bfloat16_numbers_of_the_eager_one(device):
    conv = BinaryConv2d(4, 6, 3).to(device)
    x = torch.randn(2, 4, 8, 8).sign().to(device)
    with autocast(device, "bfloat16"):
        eager, fast = (f(x) for f in (conv, compiled(conv, COMPILED)))
    assert fast.dtype == torch.bfloat16
    # On a GPU mean|w| is summed in another order, which may round the other way.
    torch.testing.assert_close(fast, eager, rtol=0 if device == CPU else 2**-7, atol=0)


# Of output and gradients, to their norm.  In TF32, of 11 bits, sums of signs are still exact; in
# bfloat16 a PReLU whose input is within a rounding of 0 may take its other slope.
ROUNDING = {"float32": 1e-5, "tf32": 2**-9, "bfloat16": 2**-3, "bfloat16_residual": 2**-3}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_block_has_the_numbers_of_the_float32_reference_to_its_rounding(device, precision):
    block = tiny(width=1 / 4).layer2[0].to(device)
    x = torch.randn(4, 16, 8, 8).to(device)
    expected = outputs_and_gradients(to_reference(block), x, "float32")
    set_precision(precision)
    # On a CPU the tests above compile; on a GPU each precision has kernels of its own.
    for compile, channels_last in itertools.product({False, device != CPU}, (False, True)):
        fast = {"compile": compile, "channels_last": channels_last}
        way = config_with(precision=precision, **fast)
        fast = compiled(place(copy.deepcopy(block), way, device), way)
        results = outputs_and_gradients(fast, x, precision)
        for mine, theirs in zip(results, expected, strict=True):
            assert (mine - theirs).norm() <= ROUNDING[precision] * theirs.norm()


def outputs_and_gradients(block: nn.Module, x: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Of the input and the parameters, for a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    with autocast(x.device, precision):
        y = block(x)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], upstream)]


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


def test_training_runs_in_bfloat16_channels_last_and_in_parts(run_step, tmp_path, device):
    fast = {"precision": "bfloat16", "channels_last": "true", "accumulate": 2, "device": device}
    result = run_step(2, init_from="none", **fast)
    assert result.code == 0, result.err
    state = torch.load(tmp_path / "step2" / "model_best.pth.tar", weights_only=True)["state_dict"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert run_step(2, save=tmp_path / "other", precision="half").code == 2
