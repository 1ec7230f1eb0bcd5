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
from torch import nn

from models.export.exported import INPUT, OUTPUT
from models.export.fold import fold_scales
from models.layers import AvgPool2x2, LearnableBias
from models.reactnet import Block
from models.resnet import BiRealBlock, LearnedScale, ReActBlock, StrongBaselineBlock
from utils.binarize import BinaryConv2d, RPReLU, Sign
from utils.run.errors import UserError

CHANNEL_BLOCK = 8  # the engine binarizes whole bytes of channels, and is wrong on a part of one


def thresholds(scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 t and signs with Sign(scale * x + shift) = signs * (+1 if x > t else -1), x float32.

    Sign(0) is +1: for a positive scale, t is the last float32 with scale * t + shift < 0; for a
    negative one the comparison turns round, and t is the last with scale * t + shift >= 0.
    """
    limit = np.finfo(np.float32).max
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        root = np.where(scale == 0, -np.inf, -shift / scale).clip(-limit, limit)
        t = root.astype(np.float32)
        is_beyond = np.where(scale < 0, t > root, t >= root)
        t = np.where(is_beyond, np.nextafter(t, np.float32(-np.inf)), t).clip(-limit, limit)
    signs = np.where((scale < 0) | ((scale == 0) & (shift < 0)), -1.0, 1.0)
    return t, signs


@dataclass(frozen=True)
class AffineNode:
    """scale * node + shift, one of each per channel: these maps wait here, not in nodes."""

    node: Any
    scale: np.ndarray  # (C,), float64
    shift: np.ndarray  # (C,)

    def affine(self, scale: np.ndarray | float, shift: np.ndarray | float) -> "AffineNode":
        """scale * self + shift."""
        return AffineNode(self.node, self.scale * scale, self.shift * scale + shift)


class Graph:
    """Makes the nodes of layers with the openvino package; `names` are of binary convolutions."""

    def __init__(self, engine: ModuleType, names: dict[nn.Module, str]):
        self.engine, self.op, self.names = engine, engine.opset13, names
        self.makers = {
            nn.Identity: lambda x, _: x,
            nn.Sequential: lambda x, layers: self.apply(x, *layers),
            nn.Conv2d: self.convolution,
            nn.BatchNorm2d: self.batch_norm,
            nn.MaxPool2d: self.max_pool,
            AvgPool2x2: self.average_pool,
            LearnableBias: lambda x, layer: x.affine(1.0, layer.bias.numpy().ravel()),
            LearnedScale: self.learned_scale,
            RPReLU: self.prelu,
            BinaryConv2d: self.binary_convolution,
            Block: self.reactnet_a_block,
            ReActBlock: self.react_block,
            BiRealBlock: self.bireal_block,
            StrongBaselineBlock: self.strong_baseline_block,
        }

    def apply(self, x: AffineNode, *layers: nn.Module) -> AffineNode:
        """The layers one after the other."""
        for layer in layers:
            x = self.makers[type(layer)](x, layer)
        return x

    def input(self, *shape: int) -> AffineNode:
        """An input of the network; -1 leaves a dimension dynamic."""
        node = self.op.parameter(list(shape), np.float32, name=INPUT)
        return AffineNode(node, np.ones(shape[1]), np.zeros(shape[1]))

    def constant(self, values: np.ndarray):
        return self.op.constant(values.astype(np.float32))

    def per_channel(self, values: np.ndarray):
        return self.constant(values.reshape(1, -1, 1, 1))

    def apply_scale(self, x: AffineNode) -> AffineNode:
        """The same values, with the scale in a node."""
        if (x.scale == 1).all():
            return x
        node = self.op.multiply(x.node, self.per_channel(x.scale))
        return AffineNode(node, np.ones_like(x.scale), x.shift)

    def apply_affine(self, x: AffineNode) -> AffineNode:
        """The same values, with scale and shift in nodes."""
        x = self.apply_scale(x)
        if (x.shift == 0).all():
            return x
        node = self.op.add(x.node, self.per_channel(x.shift))
        return AffineNode(node, x.scale, np.zeros_like(x.shift))

    def add(self, x: AffineNode, y: AffineNode) -> AffineNode:
        x, y = self.apply_scale(x), self.apply_scale(y)
        return AffineNode(self.op.add(x.node, y.node), x.scale, x.shift + y.shift)

    def batch_norm(self, x: AffineNode, *layers: nn.BatchNorm2d) -> AffineNode:
        """BN; several norm the concatenated outputs of as many convolutions."""
        mean, var, weight, bias = (
            np.concatenate([getattr(layer, name).numpy() for layer in layers])
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / np.sqrt(var + layers[0].eps)
        return x.affine(scale, bias - mean * scale)

    def learned_scale(self, x: AffineNode, layer: LearnedScale) -> AffineNode:
        positions = (layer.row * layer.column).numpy()[None]  # (1, 1, H, W)
        if tuple(x.node.get_output_partial_shape(0))[2:] == positions.shape[2:]:
            x = self.apply_affine(x)
            x = replace(x, node=self.op.multiply(x.node, self.constant(positions)))
        return x.affine(layer.channel.numpy().ravel(), 0.0)

    def prelu(self, x: AffineNode, layer: nn.PReLU) -> AffineNode:
        x = self.apply_affine(x)
        return replace(x, node=self.op.prelu(x.node, self.constant(layer.weight.numpy())))

    def average_pool(self, x: AffineNode, _: AvgPool2x2) -> AffineNode:
        node = self.op.avg_pool(x.node, [2, 2], [0, 0], [0, 0], [2, 2], True, "ceil")
        return replace(x, node=node)  # (N, C, ceil(H/2), ceil(W/2))

    def max_pool(self, x: AffineNode, layer: nn.MaxPool2d) -> AffineNode:
        x = self.apply_scale(x)
        size, stride, padding = ([n] * 2 for n in (layer.kernel_size, layer.stride, layer.padding))
        node = self.op.max_pool(x.node, stride, [1, 1], padding, padding, size).output(0)
        return replace(x, node=node)  # (N, C, H/s, W/s)

    def convolution(self, x: AffineNode, layer: nn.Conv2d) -> AffineNode:
        """A real-valued convolution: the stem, or 1x1 on a shortcut."""
        kernel = layer.weight.numpy()  # (O, I, kH, kW)
        if layer.padding != (0, 0):
            x = self.apply_affine(x)  # what pads is 0 after the shift
        weights = self.constant(kernel * x.scale[:, None, None])
        node = self.op.convolution(x.node, weights, *_geometry(layer))  # (N, O, H/s, W/s)
        return AffineNode(node, np.ones(len(kernel)), kernel.sum((2, 3)) @ x.shift)

    def binary_convolution(self, x: AffineNode, *layers: nn.Conv2d) -> AffineNode:
        """Sign(x) convolved with kernels of exactly -1 and +1, of several layers concatenated.

        The engine takes multiples of 8 channels.  An odd number of channels is taken twice and the
        sums halved; what is then still missing is channel 0, an even number of times, multiplied
        by +1 and -1 in turn: that adds nothing, also at the borders.
        """
        t, signs = thresholds(x.scale, x.shift)
        repeats = 1 + len(t) % 2
        filled = repeats * len(t)
        channels = np.tile(np.arange(len(t)), repeats)
        channels = np.pad(channels, (0, -filled % CHANNEL_BLOCK))
        node = x.node
        if len(channels) > len(t):
            node = self.op.gather(node, self.op.constant(channels), self.op.constant(1))
        t = self.per_channel(t[channels])
        low, high = self.per_channel(np.zeros(1)), self.per_channel(np.ones(1))
        # The engine binarizes to 0 and 1 alone, and only where input low and high are one.
        bits = self.op.fake_quantize(node, t, t, low, high, 2)  # (N, len(channels), H, W)

        kernel = np.concatenate([layer.weight.numpy() for layer in layers])  # (O, C, kH, kW)
        kernel = (kernel * signs[:, None, None])[:, channels]  # (O, len(channels), kH, kW)
        kernel[:, filled::2] = 1
        kernel[:, filled + 1 :: 2] = -1
        packed = self.engine.Tensor(self.engine.Type.u1, self.engine.Shape(kernel.shape))
        # BinaryConvolution reads the lowest bit first; the engine's own packing writes the highest.
        packed.data[:] = np.packbits(kernel.reshape(-1) > 0, bitorder="little")
        weights = self.engine.op.Constant(packed)
        # A pad value of 0 adds 0 to the sum; it does not stand for a bit.
        geometry = (*_geometry(layers[0]), "xnor-popcount", 0.0)
        node = self.op.binary_convolution(bits, weights, *geometry)  # (N, O, H/s, W/s)
        node.set_friendly_name(self.names.get(layers[0], node.get_friendly_name()))
        return AffineNode(node, np.full(len(kernel), 1 / repeats), np.zeros(len(kernel)))

    def head(self, x: AffineNode, layer: nn.Linear):
        """Global average pooling and `fc`: (N, C, H, W) -> node (N, classes)."""
        weight, bias = layer.weight.numpy(), layer.bias.numpy()
        axes = self.op.constant(np.array([2, 3]))
        mean = self.op.reduce_mean(x.node, axes, keep_dims=False)  # (N, C)
        product = self.op.matmul(mean, self.constant(weight * x.scale), False, True)
        return self.op.add(product, self.constant((weight @ x.shift + bias)[None]))

    def reactnet_a_block(self, x: AffineNode, block: Block) -> AffineNode:
        y = self.apply(x, block.move11, block.binary_3x3, block.bn1)
        x = self.add(y, self.apply(x, block.shortcut))  # (N, C, H/s, W/s)
        x = self.apply(x, block.move12, block.prelu1, block.move13)

        y = self.apply(x, block.move21)
        if block.doubles:
            y = self.binary_convolution(y, block.binary_pw_down1, block.binary_pw_down2)
            y = self.batch_norm(y, block.bn2_1, block.bn2_2)  # (N, 2C, H/s, W/s)
            twice = self.op.concat([x.node, x.node], 1)
            x = AffineNode(twice, np.tile(x.scale, 2), np.tile(x.shift, 2))
        else:
            y = self.apply(y, block.binary_pw, block.bn2)
        return self.apply(self.add(y, x), block.move22, block.prelu2, block.move23)

    def react_block(self, x: AffineNode, block: ReActBlock) -> AffineNode:
        y = self.apply(x, block.move0, block.binary_conv, block.bn1)
        y = self.add(y, self.apply(x, block.downsample))  # (N, C', H/s, W/s)
        return self.apply(y, block.move1, block.prelu, block.move2)

    def bireal_block(self, x: AffineNode, block: BiRealBlock) -> AffineNode:
        y = self.apply(x, block.binary_conv, block.bn1)
        return self.add(y, self.apply(x, block.downsample))  # (N, C', H/s, W/s)

    def strong_baseline_block(self, x: AffineNode, block: StrongBaselineBlock) -> AffineNode:
        y = self.apply(x, block.bn1, block.binary_conv, block.scale, block.prelu)
        return self.add(y, self.apply(x, block.downsample))  # (N, C', H/s, W/s)


def build_graph(engine: ModuleType, model: nn.Module, image_size: int, batch: int | None):
    """The openvino.Model of a network: images (N, 3, S, S) -> logits, N dynamic for None.

    Raises:
        UserError: its weights or its activations are real.
    """
    if not any(isinstance(module, Sign) for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} has real activations: binary convolutions need both"
        )
    model = fold_scales(copy.deepcopy(model).cpu().double()).requires_grad_(False)
    *layers, _, fc = model.children()  # in the order of the forward pass; _ is the global pooling
    graph = Graph(engine, {module: name for name, module in model.named_modules()})
    images = graph.input(-1 if batch is None else batch, 3, image_size, image_size)
    logits = graph.head(graph.apply(images, *layers), fc)
    logits.output(0).get_tensor().set_names({OUTPUT})
    images.node.output(0).get_tensor().set_names({INPUT})
    return engine.Model([logits], [images.node], type(model).__name__)


def _geometry(layer: nn.Conv2d) -> tuple[list[int], ...]:
    """Strides, padding at the beginning and at the end, dilations."""
    return tuple(map(list, (layer.stride, layer.padding, layer.padding, layer.dilation)))
