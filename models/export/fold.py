"""A trained binary network with its kernels as exactly -1 and +1, or as plain convolutions.

Training keeps latent weights w and convolves alpha * Sign(w), alpha = mean|w| per output channel.
For deployment the kernel is Sign(w), and alpha moves into what follows:

    BN(alpha x) with (mean, var, eps)  =  BN(x) with mean / alpha, (var + eps) / alpha^2 - eps

or, for the network without BN after its convolutions, into its learned scale.  Exact in real
numbers; in floating point a rounding may still flip a Sign whose input is a near-tie.
"""

import copy

import torch
from torch import Tensor, nn

from models.layers import binary_convolutions
from models.resnet import LearnedScale
from utils.binarize import BinaryConv2d, binarize_weight, channel_scale
from utils.run.errors import UserError


@torch.no_grad()
def fold_scales(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose binary kernels are -1 and +1 and whose scales are 1.

    A channel whose latents are all zero outputs 0; it is given the kernel +1, and what follows is
    made constant instead.

    Raises:
        UserError: the network has no binary weights.
    """
    if not binary_convolutions(model):
        raise UserError(f"this {type(model).__name__} has real weights: there is nothing to fold")
    model = copy.deepcopy(model).eval()
    for block in model.modules():
        for conv_name, target_name in getattr(block, "scale_folds_into", {}).items():
            conv = getattr(block, conv_name, None)
            if isinstance(conv, BinaryConv2d):
                alpha = channel_scale(conv.weight.double()).flatten()  # (O,)
                _fold_into(getattr(block, target_name), alpha)
                conv.weight.copy_(torch.where(conv.weight < 0, -1.0, 1.0))
    return model


def _fold_into(layer: nn.Module, alpha: Tensor) -> None:
    if isinstance(layer, LearnedScale):
        layer.channel.copy_(layer.channel.double() * alpha[:, None, None])
    else:
        _fold_into_batch_norm(layer, alpha)


def _fold_into_batch_norm(bn: nn.BatchNorm2d, alpha: Tensor) -> None:
    mean, var = bn.running_mean.double(), bn.running_var.double()
    dead = alpha == 0
    constant = bn.bias - bn.weight * mean / torch.sqrt(var + bn.eps)
    bn.bias.copy_(torch.where(dead, constant, bn.bias))
    bn.weight.copy_(torch.where(dead, 0, bn.weight))
    alpha = torch.where(dead, 1, alpha)
    bn.running_mean.copy_(mean / alpha)
    bn.running_var.copy_((var + bn.eps) / alpha.square() - bn.eps)


@torch.no_grad()
def to_plain_convs(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, its binary convolutions `nn.Conv2d` of the same kernels."""
    model = copy.deepcopy(model)
    for name, conv in binary_convolutions(model).items():
        plain = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            bias=False,
        ).to(conv.weight)
        plain.weight.copy_(binarize_weight(conv.weight))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain)
    return model.eval()
