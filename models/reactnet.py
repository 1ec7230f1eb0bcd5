"""ReActNet-A, the binary network that the paper trains (Liu et al., ECCV 2020)."""

from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from models.layers import AvgPool2x2, LearnableBias, conv_factory, scaled_width, sign_factory
from utils.binarize import RPReLU

# Output channels of the stem and of the 13 blocks, at width 1.
CHANNELS = [32] + [64] + [128] * 2 + [256] * 2 + [512] * 6 + [1024] * 2


class Stem(nn.Module):
    """Real-valued 3x3 convolution and BN, no activation."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


class Block(nn.Module):
    """A binary 3x3 convolution (stride s), then a binary 1x1 one, each with BN and a shortcut.

    The parameter names are the released ones, so that released checkpoints load strictly:
    `moveK1` is the threshold of the K-th RSign, Sign(x + b); `moveK2`, `preluK`, `moveK3` are the
    K-th RPReLU, PReLU(x + b1) + b2.  Where the channels double, two 1x1 convolutions C -> C
    (`binary_pw_down1`, `binary_pw_down2`) each join the shortcut and are then concatenated.

    Args:
        conv: makes the convolutions that may be binary, `LatentConv2d` or `BinaryConv2d`.
        sign: makes the binarization of their inputs, `Sign` or `RealActivation`.
    """

    # What takes up each binary convolution's scale when its weights become exactly +-1.
    scale_folds_into = MappingProxyType(
        {
            "binary_3x3": "bn1",
            "binary_pw": "bn2",
            "binary_pw_down1": "bn2_1",
            "binary_pw_down2": "bn2_2",
        }
    )

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv, sign):
        super().__init__()
        self.doubles = out_channels == 2 * in_channels
        c = in_channels
        self.move11 = LearnableBias(c)
        self.sign1 = sign()
        self.binary_3x3 = conv(c, c, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(c)
        self.shortcut = AvgPool2x2() if stride == 2 else nn.Identity()
        self.move12 = LearnableBias(c)
        self.prelu1 = RPReLU(c)
        self.move13 = LearnableBias(c)

        self.move21 = LearnableBias(c)
        self.sign2 = sign()
        if self.doubles:
            self.binary_pw_down1 = conv(c, c, 1)
            self.binary_pw_down2 = conv(c, c, 1)
            self.bn2_1 = nn.BatchNorm2d(c)
            self.bn2_2 = nn.BatchNorm2d(c)
        else:
            self.binary_pw = conv(c, c, 1)
            self.bn2 = nn.BatchNorm2d(c)
        self.move22 = LearnableBias(out_channels)
        self.prelu2 = RPReLU(out_channels)
        self.move23 = LearnableBias(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        binary = self.sign1(x, self.move11.bias)
        x = self.bn1(self.binary_3x3(binary)) + self.shortcut(x)  # (N, C, H/s, W/s)
        x = self.prelu1(x, self.move12.bias, self.move13.bias)

        binary = self.sign2(x, self.move21.bias)
        if self.doubles:
            left = self.bn2_1(self.binary_pw_down1(binary)) + x
            right = self.bn2_2(self.binary_pw_down2(binary)) + x
            x = torch.cat([left, right], dim=1)  # (N, 2C, H/s, W/s)
        else:
            x = self.bn2(self.binary_pw(binary)) + x
        return self.prelu2(x, self.move22.bias, self.move23.bias)


class ReActNetA(nn.Module):
    """(N, 3, H, W) images -> (N, num_classes) logits.

    The two flags give four networks of one parameter layout: both off is the real-valued network,
    `binary_activations` alone is step 1, `binary_weights` alone binarizes the weights first, both
    on is step 2.  Stem, BN, shifts, PReLU and `fc` are always real-valued; without
    `binary_activations` RSign keeps its shift, and RPReLU is the nonlinearity.

    Args:
        num_classes: outputs of `fc`.
        binary_activations: Sign before each of the 31 convolutions, at its threshold.
        binary_weights: those convolutions use `mean|w| * Sign(w)` of their latent weights.
        activation_ste: gradient of Sign, "polynomial" (released code) or "clip" (paper).
        width: multiplies every channel count, from [32, 64, ..., 1024] at 1.
        small_images: for 32-pixel inputs; stem and last doubling block keep stride 1, so the
            whole network has stride 8 instead of 32 and the head still sees 4x4 positions.
        latent_init: start of latent weights, "positive" (released code) or "symmetric".

    Raises:
        UserError: an unknown `activation_ste` or `latent_init`, or a width that leaves no channel.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        binary_activations: bool = True,
        binary_weights: bool = True,
        activation_ste: str = "polynomial",
        width: float = 1.0,
        small_images: bool = False,
        latent_init: str = "positive",
    ):
        super().__init__()
        sign = sign_factory(binary_activations, activation_ste)
        conv = conv_factory(binary_weights, latent_init)
        stem = scaled_width(CHANNELS[0], width)
        channels = [stem * c // CHANNELS[0] for c in CHANNELS]

        self.feature = nn.ModuleList([Stem(stem, stride=1 if small_images else 2)])
        for before, after in pairwise(channels):
            keeps_size = after == before or before == stem
            keeps_size |= small_images and after == channels[-1]
            self.feature.append(Block(before, after, 1 if keeps_size else 2, conv, sign))
        self.pool1 = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        for layer in self.feature:
            x = layer(x)
        x = self.pool1(x).flatten(1)  # (N, 1024)
        return self.fc(x)
