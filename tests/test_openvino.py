"""OpenVINO: binary layers equal integers, networks equal float64, wrong engines are refused."""

import sys

import numpy as np
import pytest
import torch
from test_exact_and_packed import trained_like
from torch import nn

from models import MODELS, build_model
from models.export.fold import fold_scales
from models.export.openvino import OpenVinoNetwork, constants_path, load_engine, write_openvino
from models.export.openvino_graph import build_graph, thresholds
from models.export.openvino_selftest import (
    PRECISION,
    SelfTestLayer,
    binary_kernels,
    compare_with_integers,
)
from models.layers import GlobalAvgPool
from utils.binarize import BinaryConv2d, Sign, add_shift, binary_convolutions
from utils.run.errors import UserError

pytest.importorskip("openvino")
openvino = load_engine()

TIE = 2e-5  # inputs of Sign nearer to 0 may have another sign in float32


def assert_exact(layer: SelfTestLayer, *images: int, seed: int = 0) -> None:
    shape = (images[0], layer.conv.in_channels, *images[1:])
    computed, exact, kernels = compare_with_integers(openvino, layer, shape, seed)
    assert computed.shape == exact.shape and (computed == exact).all(), (layer, images, seed)
    assert kernels and all(name.startswith("jit_") for name in kernels), kernels


def layer_shapes(name: str) -> set[tuple[int, ...]]:
    with torch.device("meta"):
        convolutions = binary_convolutions(build_model(name)).values()
    return {(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions}


ALL_LAYERS = sorted(set.union(*map(layer_shapes, MODELS)))


@pytest.mark.parametrize("layer", ALL_LAYERS, ids=str)
def test_every_layer_of_every_network_equals_integers_at_odd_sizes_and_batches(layer):
    inputs, _, kernel, _ = layer
    assert_exact(SelfTestLayer(*layer), 3, 7, 5)
    assert_exact(SelfTestLayer(inputs, inputs, kernel, 1), 1, 1, 9)


@pytest.mark.parametrize("seed", range(40))
def test_any_layer_equals_integers(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs = map(int, rng.integers(1, 70, 2))
    kernel_size, stride = int(rng.choice([1, 3])), int(rng.choice([1, 2]))
    height, width = map(int, rng.integers(1, 14, 2))
    images = int(rng.integers(1, 4)), height, width
    if seed % 2 == 0:
        outputs, stride = inputs, 1
    layer = SelfTestLayer(inputs, outputs, kernel_size, stride, seed=seed)
    assert_exact(layer, *images, seed=seed)


def test_a_threshold_is_the_last_float_below_sign_s_turn():
    rng = np.random.default_rng(0)
    scale = rng.normal(size=1000)
    shift = np.where(rng.random(1000) < 0.2, 0.0, rng.normal(size=1000))
    t, signs = thresholds(scale, shift)
    assert t.dtype == np.float32
    for x in (t, *(np.nextafter(t, np.float32(end)) for end in (-np.inf, np.inf))):
        expected = np.where(scale * x.astype(np.float64) + shift >= 0, 1, -1)
        assert (signs * np.where(x > t, 1, -1) == expected).all()
    t, signs = thresholds(np.zeros(2), np.array([0.5, -0.5]))
    assert (t == np.finfo(np.float32).min).all() and signs.tolist() == [1, -1]


@torch.no_grad()
def in_float64(model: nn.Module, images: torch.Tensor):
    """Logits, the sums of every binary convolution, and how near each image comes to a tie."""
    exact = fold_scales(model)
    sums, nearest = {}, []
    for name, module in exact.named_modules():
        if isinstance(module, Sign):
            module.register_forward_pre_hook(
                lambda _, inputs: nearest.append(add_shift(*inputs).abs().amin((1, 2, 3)))
            )
        if name in binary_convolutions(exact):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: sums.update({name: output})
            )
    logits = exact(images.double())
    return logits, sums, torch.stack(nearest).amin(0)


def compiled_with_sums(model: nn.Module, images: torch.Tensor):
    """The engine's logits, and the sums that each of its binary convolutions gives, by name."""
    network = build_graph(openvino, model, images.shape[-1], len(images))
    layers = [node for node in network.get_ops() if node.get_type_name() == "BinaryConvolution"]
    outputs = [network.output(0), *(node.output(0) for node in layers)]
    with_sums = openvino.Model(outputs, network.get_parameters())
    compiled = openvino.Core().compile_model(with_sums, "CPU", PRECISION)
    assert all(kernel.startswith("jit_") for kernel in binary_kernels(compiled))
    logits, *sums = compiled(images.numpy()).to_tuple()
    names = [node.get_friendly_name() for node in layers]
    return logits, dict(zip(names, sums, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("width", "size", "small"), [(1 / 8, 33, False), (3 / 32, 15, True)])
def test_every_binary_layer_in_its_network_gives_the_integers_of_float64(name, width, size, small):
    model = trained_like(name, width=width, small_images=small)
    batch = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(2))
    expected, exact_sums, nearest = in_float64(model, batch)
    away = (nearest > TIE).numpy()
    assert away.sum() >= 3
    logits, sums = compiled_with_sums(model, batch)
    for layer, computed in sums.items():
        exact = exact_sums.pop(layer)
        if layer.endswith("binary_pw_down1"):  # both in one
            exact = torch.cat([exact, exact_sums.pop(layer.replace("down1", "down2"))], dim=1)
        if model.get_submodule(layer).in_channels % 2:
            exact = 2 * exact  # halved by the scale that follows
        assert (computed[away] == exact.numpy()[away]).all(), layer
    assert not exact_sums
    assert abs(logits - expected.numpy())[away].max() < 5e-5


@pytest.mark.parametrize("batch", [None, 3])
@torch.no_grad()
def test_a_written_network_predicts_as_the_network_for_any_number_of_images(tmp_path, batch):
    model = trained_like("reactnet_r18").float()
    path = tmp_path / "network.xml"
    write_openvino(model, path, 32, batch, val_resize=36)
    network = OpenVinoNetwork(path)
    assert (network.image_size, network.val_resize, network.batch) == (32, 36, batch)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, _, nearest = in_float64(model.double(), images)
    for count in (1, 3, 4):
        difference = (network(images[:count]) - expected[:count]).abs().amax(1)
        assert (difference < 5e-5)[nearest[:count] > TIE].all()
    with pytest.raises(UserError, match="computes images of 32 pixels, not 16: leave --image_size"):
        network(images[..., :16, :16])


class GatedBlock(nn.Module):
    scale_folds_into = (("binary_conv", "bn"),)

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.sign = Sign()
        self.binary_conv = BinaryConv2d(channels, width, 3, padding=1, latent_init="symmetric")
        self.bn = nn.BatchNorm2d(width)
        nn.init.normal_(self.bn.bias)  # a sum of 0 gives no 0 for the next Sign
        self.gate = nn.Sequential(GlobalAvgPool(), nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.binary_conv(self.sign(x)))
        return torch.cat([x, y * self.gate(y)], dim=1)


class NewNetwork(nn.Module):
    """Of this repo's layers, in an order that the exporter has never seen."""

    def __init__(self, nonlinearity: type[nn.Module] = nn.PReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.MaxPool2d(2), nn.BatchNorm2d(5))
        self.blocks = nn.Sequential(GatedBlock(5, 3), nonlinearity(), GatedBlock(8, 7))
        self.pool, self.fc = GlobalAvgPool(), nn.Linear(15, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def test_a_network_of_known_layers_exports_without_a_line_of_its_own():
    torch.manual_seed(0)
    model = NewNetwork().double().eval()
    batch = torch.randn(5, 3, 33, 33)
    expected, exact_sums, nearest = in_float64(model, batch)
    logits, sums = compiled_with_sums(model, batch)
    away = (nearest > TIE).numpy()
    assert away.any() and len(sums) == 2
    odd = "blocks.0.binary_conv"  # of 5 channels
    assert (sums[odd][away] == 2 * exact_sums[odd][away].numpy()).all()
    assert abs(logits - expected.numpy())[away].max() < 5e-5


def test_what_has_no_exact_form_is_named():
    class Shifted(NewNetwork):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    class Branching(NewNetwork):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    class SignsIntoRealWeights(NewNetwork):
        def __init__(self):
            super().__init__()
            self.stem.append(Sign())
            self.stem.append(nn.Conv2d(5, 5, 1))

    cases = {
        "blocks.1 has no exact form": NewNetwork(nn.Softplus),
        "add has no exact form": Shifted(),
        "torch.fx cannot trace this Branching": Branching(),
        "layer stem.4: binary convolutions, and they alone": SignsIntoRealWeights(),
    }
    for words, model in cases.items():
        with pytest.raises(UserError, match=words):
            build_graph(openvino, model.eval(), 33, 1)


def test_real_weights_and_real_activations_are_refused(tmp_path):
    for option, what in (("binary_weights", "real weights"), ("binary_activations", "real act")):
        model = trained_like("reactnet_a", **{option: False})
        with pytest.raises(UserError, match=what):
            write_openvino(model, tmp_path / "network.xml", 32, 1, 32)
    assert not list(tmp_path.iterdir())


def test_a_damaged_foreign_or_incomplete_network_is_one_sentence(tmp_path):
    path = tmp_path / "network.xml"
    write_openvino(trained_like("bireal_r18"), path, 32, None, 32)
    graph, constants = path.read_bytes(), constants_path(path).read_bytes()
    damages = [
        (b"", constants),
        (graph[:2000], constants),
        (graph.replace(b"adambnn", b"another"), constants),
        (graph, b""),
        (graph, constants[:-1] + bytes([constants[-1] ^ 1])),
    ]
    for damaged_graph, damaged_constants in damages:
        path.write_bytes(damaged_graph)
        constants_path(path).write_bytes(damaged_constants)
        with pytest.raises(UserError, match="for OpenVINO, or a damaged one") as caught:
            OpenVinoNetwork(path)
        assert "\n" not in str(caught.value)
    constants_path(path).unlink()
    with pytest.raises(UserError, match=r"network\.bin beside it does not exist"):
        OpenVinoNetwork(path)


@pytest.fixture
def uncached():
    """The engine is loaded and tested again, here and afterwards."""
    load_engine.cache_clear()
    yield
    load_engine.cache_clear()


def test_a_missing_package_is_one_sentence(monkeypatch, uncached):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install -r requirements-openvino"):
        load_engine()


@pytest.mark.parametrize("release", ["2026.3.0", "2026.3.1"])
def test_releases_known_to_be_wrong_are_refused(monkeypatch, uncached, release):
    monkeypatch.setattr(openvino, "__version__", f"{release}-22476-759c5a6ab8c-releases/2026/3")
    with pytest.raises(UserError, match=f"OpenVINO {release} computes binary convolutions wrong"):
        load_engine()


def test_an_engine_that_fails_the_self_test_is_refused(monkeypatch, uncached, tmp_path):
    # What 2026.3.1 does: bits in another order than they are written.
    in_order = np.packbits
    monkeypatch.setattr(np, "packbits", lambda bits, bitorder: in_order(bits))
    with pytest.raises(UserError, match=r"computes binary convolutions wrongly on this CPU \("):
        write_openvino(trained_like("bireal_r18"), tmp_path / "network.xml", 32, None, 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kernel", ["ref_u1", None])
def test_a_cpu_without_binary_kernels_is_refused(monkeypatch, uncached, kernel):
    def compare(*layer):
        if kernel is None:
            raise RuntimeError("Exception from src/plugins: not implemented\nmore lines")
        _, exact, _ = compare_with_integers(*layer)
        return exact, exact, {kernel}

    monkeypatch.setattr("models.export.openvino.compare_with_integers", compare)
    with pytest.raises(UserError, match="for this CPU: they need x86-64") as caught:
        load_engine()
    assert "\n" not in str(caught.value)
