"""ReActNet-A, the binary network that the paper trains (Liu et al., ECCV 2020)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.layers import (
    AvgPool2x2,
    BatchNorm2d,
    GlobalAvgPool,
    LearnableBias,
    NetworkOptions,
    concatenated_conv_bn,
)
from utils.binarize import RPReLU

CHANNELS = [32] + [64] + [128] * 2 + [256] * 2 + [512] * 6 + [1024] * 2  # stem, blocks; width 1


class Block(nn.Module):
    """A binary 3x3 convolution (stride s), then a binary 1x1 one, each with BN and a shortcut.

    The parameter names are the released ones, so that released checkpoints load strictly:
    `moveK1` is the threshold of the K-th RSign, Sign(x + b); `moveK2`, `preluK`, `moveK3` are the
    K-th RPReLU, PReLU(x + b1) + b2.  Where the channels double, two 1x1 convolutions C -> C
    (`binary_pw_down1`, `binary_pw_down2`) each join the shortcut and are then concatenated.
    """

    # What takes up each binary convolution's scale when its weights become exactly +-1.
    scale_folds_into = (
        ("binary_3x3", "bn1"),
        ("binary_pw", "bn2"),
        ("binary_pw_down1", "bn2_1"),
        ("binary_pw_down2", "bn2_2"),
    )

    def __init__(self, in_channels: int, out_channels: int, stride: int, options: NetworkOptions):
        super().__init__()
        self.doubles = out_channels == 2 * in_channels
        c = in_channels
        self.move11 = LearnableBias(c)
        self.sign1 = options.sign()
        self.binary_3x3 = options.conv(c, c, 3, stride, padding=1)
        self.bn1 = BatchNorm2d(c)
        self.shortcut = AvgPool2x2() if stride == 2 else nn.Identity()
        self.move12 = LearnableBias(c)
        self.prelu1 = RPReLU(c)
        self.move13 = LearnableBias(c)

        self.move21 = LearnableBias(c)
        self.sign2 = options.sign()
        if self.doubles:
            self.binary_pw_down1 = options.conv(c, c, 1)
            self.binary_pw_down2 = options.conv(c, c, 1)
            self.bn2_1 = BatchNorm2d(c)
            self.bn2_2 = BatchNorm2d(c)
        else:
            self.binary_pw = options.conv(c, c, 1)
            self.bn2 = BatchNorm2d(c)
        self.move22 = LearnableBias(out_channels)
        self.prelu2 = RPReLU(out_channels)
        self.move23 = LearnableBias(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        binary = self.sign1(x, self.move11.bias)
        x = self.bn1(self.binary_3x3(binary)) + self.shortcut(x)  # (N, C, H/s, W/s)
        x = self.prelu1(x, self.move12.bias, self.move13.bias)

        binary = self.sign2(x, self.move21.bias)
        if self.doubles:
            convs = self.binary_pw_down1, self.binary_pw_down2
            y = concatenated_conv_bn(binary, convs, (self.bn2_1, self.bn2_2))
            x = y + torch.cat([x, x], dim=1)  # (N, 2C, H/s, W/s)
        else:
            x = self.bn2(self.binary_pw(binary)) + x
        return self.prelu2(x, self.move22.bias, self.move23.bias)


class ReActNetA(nn.Module):
    """(N, 3, H, W) images -> (N, num_classes) logits; 31 of its convolutions may be binary.

    Its options are those of `models.layers.NetworkOptions`.  For `small_images`, stem and last
    doubling block have stride 1.  Without `binary_activations` RSign keeps its shift, and RPReLU
    is the nonlinearity.
    """

    def __init__(self, num_classes: int = 1000, **options):
        super().__init__()
        options = NetworkOptions(**options)
        channels = options.scaled(CHANNELS)
        stride = 1 if options.small_images else 2
        stem = nn.Sequential()
        stem.conv1 = nn.Conv2d(3, channels[0], 3, stride, padding=1, bias=False)
        stem.bn1 = BatchNorm2d(channels[0])
        self.feature = nn.Sequential(stem)
        for before, after in pairwise(channels):
            # Every doubling block halves the size, but the first, and for small images the last.
            keeps_size = after == before or before == channels[0]
            keeps_size |= options.small_images and after == channels[-1]
            self.feature.append(Block(before, after, 1 if keeps_size else 2, options))
        self.pool1 = GlobalAvgPool()
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.pool1(self.feature(x)).flatten(1)  # (N, 1024)
        return self.fc(x)  # (N, num_classes)
