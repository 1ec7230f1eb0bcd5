"""A binary network as a graph of OpenVINO's operations, its binary convolutions in their bits.

BinaryConvolution multiplies by XNOR and adds by popcount.  Its input are the bits of FakeQuantize,
1 where x is above a threshold; its kernel are the bits of Sign(w), 1 for +1; it gives the sum of
products of -1 and +1, an integer that float32 holds exactly.  Whatever maps each channel alone
between that sum and the next Sign (scale, BN, shifts) is one multiplication and one addition,
worked out here in float64; the engine fuses both, the shortcut and PReLU into the convolution.
"""

import copy
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from models.export.exported import INPUT, OUTPUT
from models.export.fold import fold_scales
from models.layers import AvgPool2x2, LearnableBias
from models.reactnet import Block, ReActNetA
from models.resnet import BinaryResNet18, BiRealBlock, LearnedScale, ReActBlock, StrongBaselineBlock
from utils.binarize import Sign
from utils.run.errors import UserError

CHANNEL_BLOCK = 8  # the engine binarizes whole bytes of channels, and is wrong on a part of one
NO_PADDING = [0, 0]


def thresholds(scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 t and signs with Sign(scale * x + shift) = signs * (+1 if x > t else -1), x float32.

    Sign(0) is +1: for a positive scale, t is the last float32 with scale * t + shift < 0; for a
    negative one the comparison turns round, and t is the last with scale * t + shift >= 0.

    >>> t, signs = thresholds(np.array([1.0, -2.0, 0.0]), np.array([-0.5, 3.0, -1.0]))
    >>> t.tolist(), signs.tolist()
    ([0.4999999701976776, 1.5, -3.4028234663852886e+38], [1.0, -1.0, -1.0])
    """
    limit = np.finfo(np.float32).max
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        root = np.where(scale == 0, -np.inf, -shift / scale).clip(-limit, limit)
        nearest = root.astype(np.float32)
        below = np.nextafter(nearest, np.float32(-np.inf))
        last_under = np.where(nearest < root, nearest, below)
        last_not_over = np.where(nearest > root, below, nearest)
    t = np.where(scale < 0, last_not_over, last_under).clip(-limit, limit)
    signs = np.where((scale < 0) | ((scale == 0) & (shift < 0)), -1.0, 1.0)
    return t, signs


@dataclass(frozen=True)
class Value:
    """scale * node + shift, one of each per channel: maps of channels wait here, not in nodes."""

    node: Any
    scale: np.ndarray  # (C,), float64
    shift: np.ndarray  # (C,)

    def mapped(self, scale: np.ndarray | float, shift: np.ndarray | float) -> "Value":
        return Value(self.node, self.scale * scale, self.shift * scale + shift)


@dataclass(frozen=True)
class Bits:
    """Signs as bits: that of channel `channels[i]` is `signs[channels[i]]` times bit i as +-1.

    The engine takes multiples of 8 channels.  An odd number of channels is taken twice
    (`repeats` = 2) and the sums halved; what is then still missing is channel 0, an even number of
    times, to be multiplied by +1 and -1 in turn: that adds nothing, also at the borders.
    """

    node: Any
    signs: np.ndarray  # (C,), -1 and +1
    channels: np.ndarray
    repeats: int


class Graph:
    """Makes the nodes of layers; a value is (N, C, H, W).

    Args:
        engine: the openvino package.
        names: what to call the nodes of binary convolutions.
    """

    def __init__(self, engine: ModuleType, names: dict[nn.Module, str]):
        self.engine = engine
        self.op = engine.opset13
        self.names = names

    def constant(self, values: np.ndarray, *shape: int):
        return self.op.constant(values.astype(np.float32).reshape(shape or values.shape))

    def per_channel(self, values: np.ndarray):
        return self.constant(values, 1, -1, 1, 1)

    def images(self, *shape: int) -> Value:
        """The input; -1 leaves a dimension dynamic."""
        node = self.op.parameter(list(shape), np.float32, name=INPUT)
        return Value(node, np.ones(shape[1]), np.zeros(shape[1]))

    def scaled(self, x: Value) -> Value:
        """The same value, with its scale in a node."""
        if (x.scale == 1).all():
            return x
        node = self.op.multiply(x.node, self.per_channel(x.scale))
        return Value(node, np.ones_like(x.scale), x.shift)

    def plain(self, x: Value) -> Value:
        """The same value, with scale and shift in nodes."""
        x = self.scaled(x)
        if (x.shift == 0).all():
            return x
        node = self.op.add(x.node, self.per_channel(x.shift))
        return Value(node, x.scale, np.zeros_like(x.shift))

    def add(self, x: Value, y: Value) -> Value:
        x, y = self.scaled(x), self.scaled(y)
        return Value(self.op.add(x.node, y.node), x.scale, x.shift + y.shift)

    def twice(self, x: Value) -> Value:
        """(N, C, H, W) -> (N, 2C, H, W)."""
        node = self.op.concat([x.node, x.node], 1)
        return Value(node, np.tile(x.scale, 2), np.tile(x.shift, 2))

    def shift(self, x: Value, layer: LearnableBias) -> Value:
        return x.mapped(1.0, _vector(layer.bias))

    def batch_norm(self, x: Value, *layers: nn.BatchNorm2d) -> Value:
        """BN; several norm the concatenated outputs of as many convolutions."""
        mean, var, weight, bias = (
            np.concatenate([_vector(getattr(layer, name)) for layer in layers])
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / np.sqrt(var + layers[0].eps)
        return x.mapped(scale, bias - mean * scale)

    def learned_scale(self, x: Value, layer: LearnedScale) -> Value:
        height, width = layer.row.numel(), layer.column.numel()
        if list(x.node.get_output_partial_shape(0))[2:] == [height, width]:
            x = self.plain(x)
            places = self.constant(_array(layer.row * layer.column), 1, 1, height, width)
            x = replace(x, node=self.op.multiply(x.node, places))
        return x.mapped(_vector(layer.channel), 0.0)

    def prelu(self, x: Value, layer: nn.PReLU) -> Value:
        x = self.plain(x)
        return replace(x, node=self.op.prelu(x.node, self.constant(_vector(layer.weight))))

    def average_pool(self, x: Value, layer: AvgPool2x2) -> Value:
        size = [layer.kernel_size] * 2
        node = self.op.avg_pool(x.node, size, NO_PADDING, NO_PADDING, size, True, "ceil")
        return replace(x, node=node)

    def max_pool(self, x: Value, layer: nn.MaxPool2d) -> Value:
        x = self.scaled(x)
        size, stride, padding = ([n] * 2 for n in (layer.kernel_size, layer.stride, layer.padding))
        node = self.op.max_pool(x.node, stride, [1, 1], padding, padding, size).output(0)
        return replace(x, node=node)

    def convolution(self, x: Value, layer: nn.Conv2d) -> Value:
        """A real-valued convolution: the stem, or 1x1 on a shortcut."""
        kernel = _array(layer.weight)  # (O, I, kH, kW)
        if layer.padding != (0, 0):
            x = self.plain(x)  # what pads is 0 after the shift
        weights = self.constant(kernel * x.scale[:, None, None])
        node = self.op.convolution(x.node, weights, *_geometry(layer))
        return Value(node, np.ones(len(kernel)), kernel.sum((2, 3)) @ x.shift)

    def sign(self, x: Value) -> Bits:
        t, signs = thresholds(x.scale, x.shift)
        repeats = 1 + len(t) % 2
        channels = np.tile(np.arange(len(t)), repeats)
        channels = np.pad(channels, (0, -len(channels) % CHANNEL_BLOCK))
        node = x.node
        if len(channels) > len(t):
            node = self.op.gather(node, self.op.constant(channels), self.op.constant(1))
        t = self.per_channel(t[channels])
        low, high = self.per_channel(np.zeros(1)), self.per_channel(np.ones(1))
        # The engine binarizes to 0 and 1 alone, and only where input low and high are one.
        bits = self.op.fake_quantize(node, t, t, low, high, 2)
        return Bits(bits, signs, channels, repeats)

    def binary_convolution(self, x: Bits, *layers: nn.Conv2d) -> Value:
        """Kernels of exactly -1 and +1; the outputs of several layers are concatenated."""
        kernel = np.concatenate([_array(layer.weight) for layer in layers])  # (O, I, kH, kW)
        kernel = (kernel * x.signs[:, None, None])[:, x.channels]
        own = x.repeats * len(x.signs)
        kernel[:, own::2] = 1
        kernel[:, own + 1 :: 2] = -1
        bits = self.engine.Tensor(self.engine.Type.u1, self.engine.Shape(kernel.shape))
        # BinaryConvolution reads the lowest bit first; the engine's own packing writes the highest.
        bits.data[:] = np.packbits(kernel.reshape(-1) > 0, bitorder="little")
        weights = self.engine.op.Constant(bits)
        # A pad value of 0 adds 0 to the sum; it does not stand for a bit.
        how = (*_geometry(layers[0]), "xnor-popcount", 0.0)
        node = self.op.binary_convolution(x.node, weights, *how)
        node.set_friendly_name(self.names.get(layers[0], node.get_friendly_name()))
        return Value(node, np.full(len(kernel), 1 / x.repeats), np.zeros(len(kernel)))

    def head(self, x: Value, layer: nn.Linear):
        """Global average pooling and `fc`: (N, C, H, W) -> node (N, classes)."""
        weight, bias = _array(layer.weight), _array(layer.bias)
        mean = self.op.reduce_mean(x.node, self.op.constant(np.array([2, 3])), keep_dims=False)
        product = self.op.matmul(mean, self.constant(weight * x.scale), False, True)
        return self.op.add(product, self.constant(weight @ x.shift + bias, 1, -1))

    def shortcut(self, x: Value, layers: nn.Module) -> Value:
        """x itself, average pooling, or pooling, a real-valued 1x1 convolution and BN."""
        kinds = {
            nn.Identity: lambda x, _: x,
            AvgPool2x2: self.average_pool,
            nn.Conv2d: self.convolution,
            nn.BatchNorm2d: self.batch_norm,
        }
        for layer in layers if isinstance(layers, nn.Sequential) else (layers,):
            x = kinds[type(layer)](x, layer)
        return x

    def rprelu(
        self, x: Value, before: LearnableBias, prelu: nn.PReLU, after: LearnableBias
    ) -> Value:
        return self.shift(self.prelu(self.shift(x, before), prelu), after)

    def reactnet_a(self, model: ReActNetA, x: Value):
        stem, *blocks = model.feature
        x = self.batch_norm(self.convolution(x, stem.conv1), stem.bn1)
        for block in blocks:
            x = self.reactnet_a_block(x, block)
        return self.head(x, model.fc)

    def reactnet_a_block(self, x: Value, block: Block) -> Value:
        binary = self.sign(self.shift(x, block.move11))
        y = self.batch_norm(self.binary_convolution(binary, block.binary_3x3), block.bn1)
        x = self.add(y, self.shortcut(x, block.shortcut))
        x = self.rprelu(x, block.move12, block.prelu1, block.move13)

        binary = self.sign(self.shift(x, block.move21))
        if block.doubles:
            y = self.binary_convolution(binary, block.binary_pw_down1, block.binary_pw_down2)
            x = self.add(self.batch_norm(y, block.bn2_1, block.bn2_2), self.twice(x))
        else:
            y = self.batch_norm(self.binary_convolution(binary, block.binary_pw), block.bn2)
            x = self.add(y, x)
        return self.rprelu(x, block.move22, block.prelu2, block.move23)

    def resnet18(self, model: BinaryResNet18, x: Value):
        x = self.batch_norm(self.convolution(x, model.conv1), model.bn1)
        if isinstance(model.prelu, nn.PReLU):
            x = self.prelu(x, model.prelu)
        if isinstance(model.maxpool, nn.MaxPool2d):
            x = self.max_pool(x, model.maxpool)
        blocks = {
            ReActBlock: self.react_block,
            BiRealBlock: self.bireal_block,
            StrongBaselineBlock: self.strong_baseline_block,
        }
        for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
            x = blocks[type(block)](x, block)
        return self.head(x, model.fc)

    def react_block(self, x: Value, block: ReActBlock) -> Value:
        binary = self.sign(self.shift(x, block.move0))
        y = self.batch_norm(self.binary_convolution(binary, block.binary_conv), block.bn1)
        x = self.add(y, self.shortcut(x, block.downsample))
        return self.rprelu(x, block.move1, block.prelu, block.move2)

    def bireal_block(self, x: Value, block: BiRealBlock) -> Value:
        y = self.batch_norm(self.binary_convolution(self.sign(x), block.binary_conv), block.bn1)
        return self.add(y, self.shortcut(x, block.downsample))

    def strong_baseline_block(self, x: Value, block: StrongBaselineBlock) -> Value:
        binary = self.sign(self.batch_norm(x, block.bn1))
        y = self.learned_scale(self.binary_convolution(binary, block.binary_conv), block.scale)
        return self.add(self.prelu(y, block.prelu), self.shortcut(x, block.downsample))


def build_graph(engine: ModuleType, model: nn.Module, image_size: int, batch: int | None):
    """The openvino.Model of a network: images (N, 3, S, S) -> logits, N dynamic for None.

    Raises:
        UserError: its weights or its activations are real.
    """
    if not any(isinstance(module, Sign) for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} has real activations: binary convolutions need both"
        )
    exact = fold_scales(copy.deepcopy(model).double())
    graph = Graph(engine, {module: name for name, module in exact.named_modules()})
    images = graph.images(-1 if batch is None else batch, 3, image_size, image_size)
    network = graph.reactnet_a if isinstance(exact, ReActNetA) else graph.resnet18
    logits = network(exact, images)
    logits.output(0).get_tensor().set_names({OUTPUT})
    images.node.output(0).get_tensor().set_names({INPUT})
    return engine.Model([logits], [images.node], type(model).__name__)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _vector(tensor: Tensor) -> np.ndarray:
    return _array(tensor).reshape(-1)


def _geometry(layer: nn.Conv2d) -> tuple[list[int], ...]:
    """Strides, padding at the beginning and at the end, dilations."""
    return tuple(map(list, (layer.stride, layer.padding, layer.padding, layer.dilation)))
