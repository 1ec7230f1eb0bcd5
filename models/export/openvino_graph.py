"""A binary network as a graph of OpenVINO's operations, its binary convolutions in their bits.

BinaryConvolution multiplies by XNOR and adds by popcount.  Its input are the bits of FakeQuantize,
1 where x is above a threshold; its kernel are the bits of Sign(w), 1 for +1; it gives the sum of
products of -1 and +1, an integer that float32 holds exactly.  Whatever maps each channel alone
between that sum and the next Sign (scale, BN, shifts) is one multiplication and one addition,
worked out here in float64; the engine fuses both, the shortcut and PReLU into the convolution.

torch.fx traces the network: any one made of `LAYERS` and `FUNCTIONS` can be written.
"""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from models.bcdnet import CyclicShift
from models.export.exported import INPUT, OUTPUT
from models.export.fold import fold_scales
from models.layers import AvgPool2x2, BatchNorm2d, ChannelScale, GlobalAvgPool
from models.resnet import LearnedScale
from utils.binarize import BinaryConv2d, RPReLU, Sign
from utils.run.errors import UserError

CHANNEL_BLOCK = 8  # the engine binarizes whole bytes of channels, and is wrong on a part of one


def build_graph(engine: ModuleType, model: nn.Module, image_size: int, batch: int | None):
    """The openvino.Model of a network: images (N, 3, S, S) -> logits, N dynamic for None.

    Raises:
        UserError: its weights or its activations are real, or it has a layer or an operation that
            has no exact form here.
    """
    if not any(isinstance(module, Sign) for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} has real activations: binary convolutions need both"
        )
    model = fold_scales(copy.deepcopy(model).cpu().double()).requires_grad_(False)
    return trace_graph(engine, model, (batch or -1, 3, image_size, image_size))


def trace_graph(engine: ModuleType, model: nn.Module, shape: Sequence[int]):
    """The openvino.Model of a float64 network in eval mode, with binary kernels of -1 and +1."""
    try:
        traced = fx.GraphModule(model, LayerTracer().trace(model))
    except (fx.proxy.TraceError, TypeError) as error:
        raise UserError(f"torch.fx cannot trace this {type(model).__name__}: {error}") from error
    graph = Graph(engine, traced)
    images = plain(graph.op.parameter(list(shape), np.float32, name=INPUT), shape[1])
    logits = graph.apply_affine(graph.run(images)).node
    logits.output(0).get_tensor().set_names({OUTPUT})
    images.node.output(0).get_tensor().set_names({INPUT})
    return engine.Model([logits], [images.node], type(model).__name__)


class LayerTracer(fx.Tracer):
    """Looks into blocks, and not into the layers that they are made of."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in LAYERS or super().is_leaf_module(module, name)


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

    source: Any  # a node, or the `BinarySums` that will be one
    scale: np.ndarray  # (C,), float64
    shift: np.ndarray  # (C,)

    @property
    def node(self) -> Any:
        return self.source.node if isinstance(self.source, BinarySums) else self.source

    def affine(self, scale: np.ndarray | float, shift: np.ndarray | float) -> "AffineNode":
        """scale * self + shift."""
        return AffineNode(self.source, self.scale * scale, self.shift * scale + shift)


@dataclass(frozen=True)
class Signs:
    """Sign of an affine map: what a binary convolution takes."""

    x: AffineNode


@dataclass
class BinarySums:
    """Binary convolutions of the same signs, one node for all once it is asked for."""

    graph: "Graph"
    signs: Signs
    layers: list[nn.Conv2d]

    @cached_property
    def node(self) -> Any:
        return self.graph.binary_convolution_node(self.signs.x, self.layers)


class Graph(fx.Interpreter):
    """Runs a traced network on nodes of the openvino package in place of tensors."""

    def __init__(self, engine: ModuleType, traced: fx.GraphModule):
        super().__init__(traced)
        self.extra_traceback = False  # which would be put into messages
        self.engine, self.op = engine, engine.opset13
        self.names = {module: name for name, module in traced.named_modules()}

    def run_node(self, node: fx.Node) -> Any:
        try:
            return super().run_node(node)
        except (KeyError, AttributeError, TypeError) as error:
            what = getattr(node.target, "__name__", node.target)
            raise UserError(f"{what} has no exact form in OpenVINO: use other layers") from error

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        layer = self.fetch_attr(target)
        takes_signs = any(isinstance(x, Signs) for x in args)
        if takes_signs != isinstance(layer, BinaryConv2d):
            raise UserError(
                f"layer {target}: binary convolutions, and they alone, take what a Sign gives"
            )
        return LAYERS[type(layer)](self, layer, *args, **kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return FUNCTIONS[target](self, *args, **kwargs)

    call_method = call_function

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
        return plain(self.op.add(x.node, self.per_channel(x.shift)), len(x.shift))

    def add(self, x: AffineNode, y: AffineNode) -> AffineNode:
        x, y = self.apply_scale(x), self.apply_scale(y)
        return AffineNode(self.op.add(x.node, y.node), x.scale, x.shift + y.shift)

    def multiply(self, x: AffineNode, y: AffineNode) -> AffineNode:
        x, y = self.apply_affine(x), self.apply_affine(y)
        return plain(self.op.multiply(x.node, y.node), len(x.scale))

    def concatenate(self, parts: Sequence[AffineNode], dim: int = 1) -> AffineNode:
        """Along the channels; convolutions of the same signs become one."""
        sources = [x.source for x in parts]
        if all(isinstance(s, BinarySums) and s.signs is sources[0].signs for s in sources):
            layers = [layer for source in sources for layer in source.layers]
            source = BinarySums(self, sources[0].signs, layers)
        else:
            source = self.op.concat([x.node for x in parts], dim)
        scale, shift = (np.concatenate([getattr(x, n) for x in parts]) for n in ("scale", "shift"))
        return AffineNode(source, scale, shift)

    def flatten(self, x: AffineNode, start_dim: int) -> AffineNode:
        """(N, C, 1, 1) -> (N, C)."""
        x = self.apply_affine(x)
        return replace(x, source=self.op.reshape(x.node, self.op.constant([0, -1]), True))

    def batch_norm(self, layer: nn.BatchNorm2d, x: AffineNode) -> AffineNode:
        scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
        return x.affine(scale.numpy(), (layer.bias - layer.running_mean * scale).numpy())

    def learned_scale(self, layer: LearnedScale, x: AffineNode) -> AffineNode:
        positions = (layer.row * layer.column).numpy()[None]  # (1, 1, H, W)
        if tuple(x.node.get_output_partial_shape(0))[2:] == positions.shape[2:]:
            x = self.apply_affine(x)
            x = replace(x, source=self.op.multiply(x.node, self.constant(positions)))
        return x.affine(layer.channel.numpy().ravel(), 0.0)

    def channel_scale(self, layer: ChannelScale, x: AffineNode) -> AffineNode:
        return x.affine(layer.channel.numpy().ravel(), 0.0)

    def cyclic_shift(self, layer: CyclicShift, x: AffineNode) -> AffineNode:
        moves = ((1, 2), (-1, 2), (1, 3), (-1, 3))  # of each quarter, along an axis
        quarters = self.op.split(x.node, self.op.constant(1), len(moves)).outputs()
        moved = []
        for quarter, (sign, axis) in zip(quarters, moves, strict=True):
            places = np.arange(quarter.get_partial_shape()[axis].get_length())
            # The engine's own Roll takes several times as long.
            sources = self.op.constant(np.roll(places, sign * layer.pixels))
            moved.append(self.op.gather(quarter, sources, self.op.constant(axis)))
        return replace(x, source=self.op.concat(moved, 1))

    def sign(self, layer: Sign, x: AffineNode, shift: Tensor | None = None) -> Signs:
        return Signs(x.affine(1.0, 0.0 if shift is None else shift.numpy().ravel()))

    def prelu(self, layer: nn.PReLU, x: AffineNode, before=None, after=None) -> AffineNode:
        before, after = (0.0 if b is None else b.numpy().ravel() for b in (before, after))
        x = self.apply_affine(x.affine(1.0, before))
        node = self.op.prelu(x.node, self.constant(layer.weight.numpy()))
        return replace(x, source=node).affine(1.0, after)

    def elementwise(self, layer: nn.ReLU | nn.Sigmoid, x: AffineNode) -> AffineNode:
        x = self.apply_affine(x)
        return replace(x, source=getattr(self.op, type(layer).__name__.lower())(x.node))

    def pool(self, layer: nn.AvgPool2d | nn.MaxPool2d, x: AffineNode) -> AffineNode:
        sides = (layer.kernel_size, layer.stride, layer.padding)
        size, stride, padding = ([n, n] if isinstance(n, int) else list(n) for n in sides)
        rounding = "ceil" if layer.ceil_mode else "floor"
        if isinstance(layer, nn.AvgPool2d):
            node = self.op.avg_pool(x.node, stride, padding, padding, size, True, rounding)
        else:
            x = self.apply_scale(x)  # the largest value times a negative scale is the smallest
            windows = (stride, [1, 1], padding, padding, size, rounding)
            node = self.op.max_pool(x.node, *windows).output(0)
        return replace(x, source=node)  # (N, C, H/s, W/s)

    def global_average_pool(self, layer: GlobalAvgPool, x: AffineNode) -> AffineNode:
        node = self.op.reduce_mean(x.node, self.op.constant([2, 3]), keep_dims=True)
        return replace(x, source=node)  # (N, C, 1, 1)

    def linear(self, layer: nn.Linear, x: AffineNode) -> AffineNode:
        node = self.op.matmul(x.node, self.constant(layer.weight.numpy()), False, True)
        if layer.bias is not None:
            node = self.op.add(node, self.constant(layer.bias.numpy()[None]))
        return plain(node, layer.out_features)  # (N, O)

    def convolution(self, layer: nn.Conv2d, x: AffineNode) -> AffineNode:
        """A real-valued convolution: the stem, or 1x1 on a shortcut."""
        if layer.padding != (0, 0):
            x = self.apply_affine(x)  # what pads is 0 after the shift
        kernel = layer.weight.numpy()  # (O, I/G, kH, kW)
        kernel = kernel.reshape(layer.groups, -1, *kernel.shape[1:])  # (G, O/G, I/G, kH, kW)
        scale, shift = (v.reshape(layer.groups, 1, -1, 1, 1) for v in (x.scale, x.shift))
        weights, shift = kernel * scale, (kernel * shift).sum((2, 3, 4)).ravel()
        if layer.bias is not None:
            shift = shift + layer.bias.numpy()
        convolve = self.op.group_convolution
        if layer.groups == 1:
            convolve, weights = self.op.convolution, weights[0]
        node = convolve(x.node, self.constant(weights), *_geometry(layer))  # (N, O, H/s, W/s)
        return AffineNode(node, np.ones(len(shift)), shift)

    def binary_convolution(self, layer: BinaryConv2d, signs: Signs) -> AffineNode:
        if layer.groups != 1:
            raise UserError(f"layer {self.names[layer]}: no binary convolution has groups")
        halved = 1 / (1 + len(signs.x.scale) % 2)
        ones = np.ones(layer.out_channels)
        return AffineNode(BinarySums(self, signs, [layer]), ones * halved, ones * 0)

    def binary_convolution_node(self, x: AffineNode, layers: Sequence[nn.Conv2d]):
        """Sign(x) convolved with kernels of exactly -1 and +1, of several layers concatenated.

        The engine takes multiples of 8 channels.  An odd number of channels is taken twice and the
        sums halved; what is then still missing is channel 0, an even number of times, multiplied
        by +1 and -1 in turn: that adds nothing, also at the borders.
        """
        t, signs = thresholds(x.scale, x.shift)
        channels = np.tile(np.arange(len(t)), 1 + len(t) % 2)
        filled = len(channels)
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
        node.set_friendly_name(self.names[layers[0]])
        return node


LAYERS = {
    nn.Identity: lambda graph, layer, x: x,
    nn.Conv2d: Graph.convolution,
    nn.BatchNorm2d: Graph.batch_norm,
    BatchNorm2d: Graph.batch_norm,
    nn.Linear: Graph.linear,
    nn.ReLU: Graph.elementwise,
    nn.Sigmoid: Graph.elementwise,
    nn.MaxPool2d: Graph.pool,
    nn.AvgPool2d: Graph.pool,
    AvgPool2x2: Graph.pool,
    GlobalAvgPool: Graph.global_average_pool,
    CyclicShift: Graph.cyclic_shift,
    ChannelScale: Graph.channel_scale,
    LearnedScale: Graph.learned_scale,
    nn.PReLU: Graph.prelu,
    RPReLU: Graph.prelu,
    Sign: Graph.sign,
    BinaryConv2d: Graph.binary_convolution,
}
FUNCTIONS = {
    operator.add: Graph.add,
    torch.add: Graph.add,
    operator.mul: Graph.multiply,
    torch.mul: Graph.multiply,
    torch.cat: Graph.concatenate,
    torch.flatten: Graph.flatten,
    "flatten": Graph.flatten,
}


def plain(node: Any, channels: int) -> AffineNode:
    """A node whose values are what it gives."""
    return AffineNode(node, np.ones(channels), np.zeros(channels))


def _geometry(layer: nn.Conv2d) -> tuple[list[int], ...]:
    """Strides, padding at the beginning and at the end, dilations."""
    return tuple(map(list, (layer.stride, layer.padding, layer.padding, layer.dilation)))
