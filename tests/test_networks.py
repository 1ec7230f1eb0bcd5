"""The networks: golden numbers of the released code, layouts, and what the options do."""

import golden
import pytest
import torch
import torch.nn.functional as F
from conftest import config_with, narrow
from torch import nn
from torch.optim.swa_utils import update_bn

from models import MODELS, build_model
from models.bcdnet import BinaryMLPBlock, CyclicShift
from models.layers import NetworkOptions
from models.resnet import LearnedScale
from utils.binarize import ACTIVATION_STES, Sign, binary_convolutions
from utils.losses import soft_target_loss
from utils.optim import build_optimizer
from utils.run.errors import UserError

CASES = sorted(path.stem for path in golden.FOLDER.glob("*_step?.json"))
FLAGS = [(a, w) for a in (False, True) for w in (False, True)]
TOLERANCE = 1e-8


def relative_error(value: torch.Tensor, expected) -> float:
    value = value.cpu()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((value - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_summary(name: str, tensor: torch.Tensor, expected: dict) -> None:
    """`tensor` has the recorded norm, first four values and, to its norm's accuracy, sum."""
    tensor = tensor.cpu()
    norm = expected["norm"]
    assert abs(tensor.norm().item() - norm) <= TOLERANCE * norm, name
    assert abs(tensor.sum().item() - expected["sum"]) <= TOLERANCE * norm * tensor.numel() ** 0.5, (
        name
    )
    first = torch.tensor(expected["first4"], dtype=torch.float64)
    assert (tensor.flatten()[:4] - first).abs().max() <= TOLERANCE * norm, name


@pytest.mark.parametrize("name", CASES)
def test_golden_numbers_of_the_released_code(name, device):
    case = golden.read(name)
    network, step = name.split("_step")
    model = golden.fill(build_model(network, binary_weights=step == "2"), case["salt"]).to(device)
    images, teacher_logits = golden.images(case).to(device), golden.teacher_logits(case).to(device)

    # BCDNet-A's in eval mode seem to be means with its second head, whose weights are not known.
    if case["case"] != "bcdnet_a_step2":
        with torch.no_grad():
            logits = model.eval()(images)
        assert relative_error(logits[:, :8], case["eval_logits_first8"]) < TOLERANCE
        assert relative_error(logits.sum(), case["eval_logits_sum"]) < TOLERANCE
        assert relative_error(logits.norm(), case["eval_logits_norm"]) < TOLERANCE

    config = config_with(learning_rate=case["lr"], weight_decay=case["weight_decay"])
    optimizer = build_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = [names[parameter] for parameter in optimizer.param_groups[1]["params"]]
    assert sorted(decayed) == sorted(case["decayed"])

    model.train()
    for step, expected_loss in enumerate(case["losses"]):
        logits = model(images)
        loss = soft_target_loss(logits, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        assert relative_error(loss.detach(), expected_loss) < TOLERANCE
        if step == 0:
            first8 = logits[:, :8].detach()
            assert relative_error(first8, case["train_logits_first8"]) < TOLERANCE
            assert list(case["grad"]) == [name for name, _ in model.named_parameters()]
            for name, parameter in model.named_parameters():
                assert_summary(name, parameter.grad, case["grad"][name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert_summary(name, parameter.detach(), case["after"][name])


@pytest.mark.parametrize(("activations", "weights"), FLAGS)
@pytest.mark.parametrize("name", ["reactnet_a", "reactnet_r18", "bireal_r18", "bcdnet_a"])
def test_layout_is_the_released_one_for_every_combination_of_flags(name, activations, weights):
    with torch.device("meta"):
        model = build_model(name, binary_activations=activations, binary_weights=weights)
    layout = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert layout == list(golden.read_layout(f"{name}_step2").items())


@pytest.mark.parametrize(("activations", "weights"), FLAGS)
@pytest.mark.parametrize("ste", ACTIVATION_STES)
@pytest.mark.parametrize(
    ("name", "size"), [*((name, 32) for name in MODELS), ("real_to_binary_r18", 48)]
)
def test_every_parameter_receives_a_gradient(name, size, activations, weights, ste):
    torch.manual_seed(0)
    model = build_model(
        name,
        num_classes=4,
        width=narrow(name, 0.125),
        small_images=True,
        binary_activations=activations,
        binary_weights=weights,
        activation_ste=ste,
        latent_init="symmetric",
    )
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    # Without Sign a shift is only a constant, which the next BN takes out again.
    needless = () if activations else ("move11.bias", "move21.bias", "move0.bias")
    needless += ("scale.row", "scale.column") if size != 32 else ()
    assert not [n for n, g in gradients.items() if not g.any() and not n.endswith(needless)]


@pytest.mark.parametrize("name", MODELS)
def test_bn_can_be_recalibrated_to_the_mean_over_batches(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=4, width=narrow(name, 0.125), small_images=True)
    update_bn([torch.randn(8, 3, 32, 32) for _ in range(2)], model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 2 and norm.momentum == 0.1 for norm in norms)
    images = torch.randn(8, 3, 32, 32)
    update_bn([images], model)
    torch.testing.assert_close(model.eval()(images), model.train()(images), rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_bn_of_momentum_0_or_in_eval_mode_keeps_its_statistics(name):
    model = build_model(name, num_classes=4, width=narrow(name, 0.125), small_images=True)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    model(torch.randn(8, 3, 32, 32))
    for norm in norms[1::2]:
        norm.momentum = 0.1
        norm.eval()
    model(torch.randn(8, 3, 32, 32))
    assert all((n.running_mean == 0).all() and (n.running_var == 1).all() for n in norms)


@pytest.mark.parametrize(("activations", "weights"), FLAGS)
@pytest.mark.parametrize("name", MODELS)
def test_flags_decide_what_is_binary(name, activations, weights):
    with torch.device("meta"):
        model = build_model(name, binary_activations=activations, binary_weights=weights)
    assert bool(binary_convolutions(model)) == weights
    assert any(isinstance(module, Sign) for module in model.modules()) == activations


@pytest.mark.parametrize(
    ("size", "small", "positions"), [(224, False, 7), (64, False, 2), (32, True, 4), (33, True, 5)]
)
@pytest.mark.parametrize("name", MODELS)
def test_positions_that_reach_the_head(name, size, small, positions):
    width = narrow(name, 1 / 32)
    model = build_model(name, num_classes=3, width=width, small_images=small).eval()
    *_, pooling = (m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    seen = []
    pooling.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)
    assert seen == [(positions, positions)]


@pytest.mark.parametrize(("name", "binary"), [("bireal_r18", 16), ("meliusnet29", 48)])
def test_without_binary_activations_networks_without_prelu_keep_a_nonlinearity(name, binary):
    with torch.device("meta"):
        real, model = (build_model(name, binary_activations=binary) for binary in (False, True))
    relus = [sum(isinstance(m, nn.ReLU) for m in network.modules()) for network in (real, model)]
    assert relus[0] - relus[1] == binary


def test_strong_baseline_scales_by_three_vectors_at_its_size_and_by_channel_at_others():
    scale = LearnedScale(2, 3)
    scale.channel.data = torch.tensor([2.0, 3.0])[:, None, None]
    scale.row.data = torch.tensor([1.0, 5.0, 7.0])[None, :, None]
    scale.column.data = torch.tensor([1.0, 11.0, 13.0])[None, None, :]
    assert scale(torch.ones(1, 2, 3, 3))[0, 1, 2, 1] == 3 * 7 * 11
    assert scale(torch.ones(1, 2, 4, 4)).unique().tolist() == [2, 3]
    model = build_model("strong_baseline_r18", width=1 / 32).eval()
    scales, seen = [m for m in model.modules() if isinstance(m, LearnedScale)], []
    for scale in scales:
        scale.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    model(torch.zeros(1, 3, 224, 224))
    assert seen == [scale.row.numel() for scale in scales]


def test_default_gradient_of_sign_is_each_networks_own():
    other = {"strong_baseline_r18": "clip", "real_to_binary_r18": "clip", "meliusnet29": "clip_1.3"}
    for name in MODELS:
        with torch.device("meta"):
            model = build_model(name)
        ste = other.get(name, "polynomial")
        assert {m.ste for m in model.modules() if isinstance(m, Sign)} == {ste}


@pytest.mark.parametrize("width", [0.1, 0.3, 0.5, 2.0])
def test_width_multiplies_every_channel_count(width):
    with torch.device("meta"):
        model = build_model("reactnet_a", width=width)
    stem = round(32 * width)
    assert model.feature[0].conv1.out_channels == stem
    assert model.fc.in_features == 32 * stem


def test_unusable_options_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="choose one of reactnet_a, reactnet_r18, bireal_r18"):
        build_model("reactnet_b")
    for name in MODELS:
        with pytest.raises(UserError, match="leaves no channel"):
            build_model(name, width=0.005)
    with pytest.raises(UserError, match=r"leaves 10 channels.*a multiple of 0\.25, the smallest"):
        build_model("meliusnet29", width=0.3)


def test_the_gate_of_real_to_binary_is_its_equation():
    torch.manual_seed(0)
    block = build_model("real_to_binary_r18", latent_init="symmetric").layer2[0]
    x = 1 + 2 * torch.randn(2, 64, 6, 6)
    normed = block.bn1(x)
    first, second = (block.gate[i].weight[:, :, 0, 0] for i in (1, 3))
    gate = torch.sigmoid(torch.relu(normed.mean((2, 3)) @ first.T) @ second.T)  # (N, C')
    y = block.binary_conv(normed.sign()) * gate[:, :, None, None]
    torch.testing.assert_close(block(x), block.prelu(y) + block.downsample(x))


def test_a_strong_baseline_block_adds_its_shortcut_behind_the_prelu():
    torch.manual_seed(0)
    block = build_model("strong_baseline_r18", latent_init="symmetric").layer2[0]
    block.scale.channel.data.uniform_(1, 2)
    x = torch.randn(2, 64, 6, 6)
    y = block.scale(block.binary_conv(block.bn1(x).sign()))
    torch.testing.assert_close(block(x), block.prelu(y) + block.downsample(x))


def test_a_cyclic_shift_moves_quarters_of_the_channels_down_up_right_and_left():
    x = torch.arange(9.0).reshape(1, 1, 3, 3).expand(1, 8, 3, 3)
    down, up, right, left = CyclicShift(1)(x)[0, ::2].tolist()
    assert down == [[6, 7, 8], [0, 1, 2], [3, 4, 5]] and up == [[3, 4, 5], [6, 7, 8], [0, 1, 2]]
    assert right == [[2, 0, 1], [5, 3, 4], [8, 6, 7]] and left == [[1, 2, 0], [4, 5, 3], [7, 8, 6]]
    assert torch.equal(CyclicShift(3)(x), x)


def test_a_shift_block_sums_convolutions_of_the_signs_where_they_are_and_moved_by_1_and_3():
    block = BinaryMLPBlock(8, True, NetworkOptions(latent_init="symmetric"))
    x = torch.randn(2, 8, 9, 9)
    near, far = CyclicShift(1)(x.sign()), CyclicShift(3)(x.sign())
    y = block.binary_conv(x.sign()) + block.binary_conv1(near) + block.binary_conv2(far)
    torch.testing.assert_close(block(x), block.prelu(block.bn1(y) + x))


def test_a_dense_block_appends_channels_that_the_improvement_block_adds_to():
    pair = build_model("meliusnet29", width=1 / 4).stages[0].eval()
    x = torch.randn(2, 16, 5, 5)
    dense = pair.binary_conv1(pair.sign1(pair.bn1(x)))
    improvement = pair.binary_conv2(pair.sign2(pair.bn2(torch.cat([x, dense], 1))))
    assert torch.equal(pair(x), torch.cat([x, dense + improvement], 1))


def test_relus_stand_before_the_real_convolution_of_a_transition_and_before_the_head():
    torch.manual_seed(0)
    model = build_model("meliusnet29", width=1 / 4, num_classes=3)
    norm, *_, conv = between = next(m for m in model.stages if isinstance(m, nn.Sequential))
    x = torch.randn(2, norm.num_features, 5, 5)
    pooled = F.max_pool2d(norm(x), 2, ceil_mode=True)
    torch.testing.assert_close(between(x), conv(pooled.relu()))
    images = torch.randn(2, 3, 64, 64)
    features = model.bn(model.stages(model.stem(images))).relu()
    torch.testing.assert_close(model(images), model.fc(features.mean((2, 3))))
