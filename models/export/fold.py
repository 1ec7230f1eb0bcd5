"""A trained binary network with its kernels as exactly -1 and +1, or as plain convolutions.

Training keeps latent weights w and convolves alpha * Sign(w), alpha = mean|w| per output channel.
For deployment the kernel is Sign(w), and alpha moves into what follows:

    BN(alpha x) with weight, mean  =  BN(x) with alpha weight, mean / alpha

or, where no BN follows one convolution alone, into a learned scale or a `ChannelScale`.  Exact in
real numbers; in floating point a rounding may still flip a Sign whose input is a near-tie.
"""

import copy

import torch
from torch import Tensor, nn

from models.layers import ChannelScale
from models.resnet import LearnedScale
from utils.binarize import BinaryConv2d, binarize_weight, binary_convolutions, channel_scale
from utils.run.errors import UserError


@torch.no_grad()
def fold_scales(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose binary kernels are -1 and +1 and whose scales are 1.

    A channel whose latent weights are all zero outputs 0; it is given the kernel +1, and what
    follows is made constant instead.

    Raises:
        UserError: the network has no binary weights, or one whose scale nothing takes up.
    """
    model = copy.deepcopy(model).eval()
    unfolded = {conv: name for name, conv in binary_convolutions(model).items()}
    if not unfolded:
        raise UserError(f"this {type(model).__name__} has real weights: there is nothing to fold")
    for block in model.modules():
        for conv_name, target_name in getattr(block, "scale_folds_into", ()):
            conv = getattr(block, conv_name, None)
            if isinstance(conv, BinaryConv2d):
                _fold_into(getattr(block, target_name), conv.weight)
                conv.weight.copy_(torch.where(conv.weight < 0, -1.0, 1.0))
                del unfolded[conv]
    for name in unfolded.values():
        raise UserError(
            f"no layer takes up the scale of {name}: name the one behind it in `scale_folds_into`"
            " of its block"
        )
    return model


def _fold_into(layer: nn.BatchNorm2d | LearnedScale | ChannelScale, weight: Tensor) -> None:
    alpha = channel_scale(weight.double()).flatten()  # (O,)
    if isinstance(layer, ChannelScale) and layer.channel is None:
        layer.channel = torch.ones_like(weight[:, 0, :1, :1])  # (O, 1, 1)
    if isinstance(layer, LearnedScale | ChannelScale):
        layer.channel.copy_(layer.channel.double() * alpha[:, None, None])
        return
    mean, var = layer.running_mean.double(), layer.running_var.double()
    is_zero = alpha == 0
    constant = layer.bias - layer.weight * mean / torch.sqrt(var + layer.eps)
    layer.bias.copy_(torch.where(is_zero, constant, layer.bias))
    layer.weight.copy_(layer.weight.double() * alpha)
    layer.running_mean.copy_(mean / torch.where(is_zero, 1, alpha))


@torch.no_grad()
def to_plain_convs(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, its binary convolutions `nn.Conv2d` of the same kernels."""
    model = copy.deepcopy(model).eval()
    for conv in binary_convolutions(model).values():
        conv.weight.copy_(binarize_weight(conv.weight))
        conv.__class__ = nn.Conv2d
    return model
