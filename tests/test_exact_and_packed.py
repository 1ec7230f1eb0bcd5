"""Exact +-1 weights, packing and ONNX: the same network, and small."""

import random
import sys

import pytest
import safetensors.torch
import torch
from conftest import narrow
from torch import nn

from models import MODELS, build_model
from models.checkpoints import load_network
from models.export.fold import fold_scales, to_plain_convs
from models.export.onnx import OnnxNetwork, write_onnx
from models.resnet import ReActBlock
from utils.binarize import binary_convolutions
from utils.checkpoint.packed import read_packed, write_packed
from utils.metrics import pack_signs, unpack_signs
from utils.run.errors import UserError


def trained_like(name: str, seed: int = 0, **options) -> nn.Module:
    """A network with BN, scales and latent weights as various as after training, in float64."""
    torch.manual_seed(seed)
    options = {"num_classes": 5, "width": 1 / 8, "small_images": True, **options}
    options["width"] = narrow(name, options["width"])
    model = build_model(name, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    for conv in binary_convolutions(model).values():
        nn.init.normal_(conv.weight, 0.0, 0.3)
        conv.weight.data *= torch.rand(len(conv.weight), 1, 1, 1, dtype=torch.float64) + 0.05
    return model.eval()


def images(count: int = 8, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("has_zero_channels", [False, True])
@torch.no_grad()
def test_exact_weights_give_the_same_logits_in_float64(name, has_zero_channels):
    model = trained_like(name)
    convolutions = binary_convolutions(model).values()
    for conv in convolutions if has_zero_channels else ():
        conv.weight.data[0] = 0
    exact = fold_scales(model)
    difference = exact(images()) - model(images())
    assert torch.isfinite(difference).all() and difference.abs().max() < 1e-9
    assert all((conv.weight.abs() == 1).all() for conv in binary_convolutions(exact).values())
    assert all((conv.weight.abs() != 1).any() for conv in convolutions)


@torch.no_grad()
def test_real_weights_have_nothing_to_fold_and_plain_convolutions_equal_binary_ones():
    with pytest.raises(UserError, match="has real weights"):
        fold_scales(trained_like("reactnet_a", binary_weights=False))
    model = trained_like("bireal_r18")
    plain = to_plain_convs(model)
    assert not binary_convolutions(plain)
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-9, atol=1e-9)


def test_a_scale_that_nothing_takes_up_is_an_error_that_names_its_layer(monkeypatch):
    monkeypatch.setattr(ReActBlock, "scale_folds_into", ())
    with pytest.raises(UserError, match=r"takes up the scale of layer1\.0\.binary_conv"):
        fold_scales(trained_like("reactnet_r18"))


def test_signs_are_packed_from_the_lowest_bit_on_and_come_back():
    signs = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1]).bool().reshape(5, 2, 1, 1)
    packed = pack_signs(signs)
    assert packed.tolist() == [0b1, 0b11] and packed.dtype == torch.uint8
    assert torch.equal(unpack_signs(packed, [5, 2, 1, 1]), signs)


def pack(model: nn.Module, path, dtype=torch.float32, name="reactnet_a") -> None:
    binary = {f"{name}.weight" for name in binary_convolutions(model)}
    network = {"model": name, "width": narrow(name, 1 / 8), "small_images": True}
    network |= {"binary_weights": True, "binary_activations": True}
    write_packed(path, model.state_dict(), binary, {"network": network}, dtype)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_packed_file_gives_back_the_exact_network_bit_for_bit(name, tmp_path):
    exact = fold_scales(trained_like(name).float())
    path = tmp_path / "packed.safetensors"
    pack(exact, path, name=name)
    state, _ = read_packed(path)
    assert all(torch.equal(state[key], value) for key, value in exact.state_dict().items())
    loaded = load_network(path)
    assert loaded.checkpoint.layout == "packed" and loaded.has_exact_weights
    assert torch.equal(loaded.model(images().float()), exact(images().float()))


def test_reactnet_a_packs_below_8_1_megabytes(tmp_path):
    exact = fold_scales(build_model("reactnet_a"))
    path = tmp_path / "packed.safetensors"
    pack(exact, path)
    assert 7.9e6 < path.stat().st_size < 8.1e6
    pack(exact, path, torch.float16)
    assert path.stat().st_size < 5.9e6


def test_float16_keeps_kernels_exact_and_rounds_the_rest(tmp_path):
    model = trained_like("reactnet_a").float()
    for conv in binary_convolutions(model).values():
        conv.weight.data /= 1000  # as small as those that the released code starts with
    exact = fold_scales(model)
    path = tmp_path / "packed.safetensors"
    pack(exact, path, torch.float16)
    state, _ = read_packed(path)
    torch.testing.assert_close(state, dict(exact.state_dict()), rtol=2**-10, atol=1e-4)
    assert (state["feature.3.binary_3x3.weight"].abs() == 1).all()


def test_a_flipped_bit_of_a_packed_file_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "packed.safetensors"
    pack(fold_scales(trained_like("reactnet_a", width=1 / 32).float()), path)
    whole, (state, content) = path.read_bytes(), read_packed(path)
    chance = random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    places = [*range(8 + 64), *(chance.randrange(8 + header) for _ in range(150))]
    places += [chance.randrange(8 + header, len(whole)) for _ in range(150)]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            read, said = read_packed(path)
        except UserError:
            refused += 1
            continue
        assert said == content and list(read) == list(state)
        assert all(torch.equal(read[key], value) for key, value in state.items())
    assert refused > 0.95 * len(places)


def test_damaged_and_foreign_packed_files_are_one_sentence(tmp_path):
    path = tmp_path / "packed.safetensors"
    pack(fold_scales(trained_like("reactnet_a").float()), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a packed file, or a damaged one") as caught:
            load_network(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"other": "1"}))
    with pytest.raises(UserError, match="not one packed by this repo"):
        load_network(path)


@pytest.mark.parametrize("batch", [None, 3])
@torch.no_grad()
def test_onnx_predicts_as_the_network_for_any_number_of_images(tmp_path, batch):
    pytest.importorskip("onnxruntime")
    model = trained_like("reactnet_r18", width=1 / 16).float()
    path = tmp_path / "network.onnx"
    write_onnx(model, path, 32, batch, val_resize=36)
    network = OnnxNetwork(path)
    assert (network.image_size, network.val_resize) == (32, 36)
    for count in (1, 3, 4):
        logits = network(images(count).float())
        assert logits.shape == (count, 5)
        assert (logits.argmax(1) == model(images(count).float()).argmax(1)).double().mean() >= 0.75


def test_a_damaged_onnx_file_and_a_missing_package_are_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    path.write_bytes(b"not a network")
    with pytest.raises(UserError, match="for onnxruntime, or a damaged one"):
        OnnxNetwork(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install -r requirements-export"):
        OnnxNetwork(path)
