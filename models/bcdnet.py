"""BCDNet-A, ReActNet-A with binary MLP blocks at its end (Xing et al., ECCV 2022).

"Towards Accurate Binary Neural Networks via Modeling Contextual Dependencies", arXiv 2209.01404.
"""

import torch
from torch import Tensor, nn

from models.layers import ChannelScale, LearnableBias, NetworkOptions
from models.reactnet import ReActNetA
from utils.binarize import RPReLU

GROUPS = 3
SHIFTS = (True, True, True, False)  # of a group's blocks: three shift blocks and a point block


class CyclicShift(nn.Module):
    """Quarters of the channels moved down, up, right and left, cyclically: (N, C, H, W) -> same."""

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        n = self.pixels
        down, up, right, left = x.chunk(4, dim=1)  # (N, C/4, H, W)
        return torch.cat([down.roll(n, 2), up.roll(-n, 2), right.roll(n, 3), left.roll(-n, 3)], 1)


class BinaryMLPBlock(nn.Module):
    """RSign -> binary 1x1 -> BN -> + x -> RPReLU, the point block.

    The shift block adds, before BN, two more binary 1x1 convolutions: of the signs moved by 1 and
    by 3 pixels.  Here x is moved and then binarized, which gives the same signs.

    Released parameter names: `move0` is the threshold of RSign, Sign(x + b); `move1`, `prelu`,
    `move2` are RPReLU, PReLU(x + b1) + b2.
    """

    # One BN could not take up the scales of three convolutions.
    scale_folds_into = (
        ("binary_conv", "scale"),
        ("binary_conv1", "scale1"),
        ("binary_conv2", "scale2"),
    )

    def __init__(self, channels: int, shifts: bool, options: NetworkOptions):
        super().__init__()
        c = channels
        self.shifts = shifts
        self.move0 = LearnableBias(c)
        self.sign = options.sign()
        self.binary_conv, self.scale = options.conv(c, c, 1), ChannelScale(c)
        if shifts:
            self.shift1, self.shift2 = CyclicShift(1), CyclicShift(3)
            self.binary_conv1, self.scale1 = options.conv(c, c, 1), ChannelScale(c)
            self.binary_conv2, self.scale2 = options.conv(c, c, 1), ChannelScale(c)
        self.bn1 = nn.BatchNorm2d(c)
        self.move1 = LearnableBias(c)
        self.prelu = RPReLU(c)
        self.move2 = LearnableBias(c)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = self.scale(self.binary_conv(self.sign(x, self.move0.bias)))
        if self.shifts:
            near = self.sign(self.shift1(x), self.move0.bias)
            far = self.sign(self.shift2(x), self.move0.bias)
            y = y + self.scale1(self.binary_conv1(near)) + self.scale2(self.binary_conv2(far))
        return self.prelu(self.bn1(y) + x, self.move1.bias, self.move2.bias)


class BCDNetA(nn.Module):
    """(N, 3, H, W) images -> (N, num_classes) logits; 55 of its convolutions may be binary.

    Its options are those of `models.layers.NetworkOptions`; `small_images` as for ReActNet-A.  The
    authors train a second head, `fc_dist`, on a teacher and predict with the mean of both: reading
    a file of theirs averages the two into `fc`.
    """

    def __init__(self, num_classes: int = 1000, **options):
        super().__init__()
        reactnet, options = ReActNetA(num_classes, **options), NetworkOptions(**options)
        # Without two of its blocks of 512 channels and the last one of 1024.
        self.feature = nn.Sequential(*reactnet.feature[:10], reactnet.feature[12])
        channels = reactnet.fc.in_features
        self.mlp_layer = nn.Sequential()
        for _ in range(GROUPS):
            blocks = [BinaryMLPBlock(channels, shifts, options) for shifts in SHIFTS]
            group = nn.Sequential()
            group.mlp_layer = nn.Sequential(*blocks)
            self.mlp_layer.append(group)
        self.pool1, self.fc = reactnet.pool1, reactnet.fc

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.mlp_layer(self.feature(x))  # (N, 1024, H/32, W/32)
        return self.fc(self.pool1(x).flatten(1))  # (N, num_classes)
