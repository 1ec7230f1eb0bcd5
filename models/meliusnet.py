"""MeliusNet29, a binary network of dense and improvement blocks (Bethge et al., arXiv 2001.05936).

It differs from the authors' code in two points.  Their binary convolutions pad with -1; here, as in
the other networks, with 0, which adds nothing to a sum: the kernel then needs no rule of its own
at the border, and larq zoo's MeliusNet does the same.  Their kernels are Sign(w); here they are
mean|w| * Sign(w), so that all networks share one weight binarizer.  The BN of every later block
takes out the scale of its inputs; only the ratio of an improvement to what it improves is affected.
"""

import torch
from torch import Tensor, nn

from models.layers import ChannelScale, GlobalAvgPool, NetworkOptions

CHANNELS = (32, 64, 128, 192, 256)  # inside the stem, then into each stage; width 1
PAIRS = (4, 6, 8, 6)  # of blocks in each stage; each pair appends as many channels as the stem has


class DenseImprovementPair(nn.Module):
    """Dense: BN -> Sign -> binary 3x3, whose channels are appended; Improvement: added to these.

    Sign is the only nonlinearity: without `binary_activations` a ReLU stands in its place.
    """

    scale_folds_into = (("binary_conv1", "scale1"), ("binary_conv2", "scale2"))

    def __init__(self, channels: int, growth: int, options: NetworkOptions):
        super().__init__()
        nonlinearity = options.sign if options.binary_activations else nn.ReLU
        self.bn1 = nn.BatchNorm2d(channels)
        self.sign1 = nonlinearity()
        self.binary_conv1 = options.conv(channels, growth, 3, padding=1)
        self.scale1 = ChannelScale(growth)
        self.bn2 = nn.BatchNorm2d(channels + growth)
        self.sign2 = nonlinearity()
        self.binary_conv2 = options.conv(channels + growth, growth, 3, padding=1)
        self.scale2 = ChannelScale(growth)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        new = self.scale1(self.binary_conv1(self.sign1(self.bn1(x))))  # (N, G, H, W)
        y = torch.cat([x, new], dim=1)  # (N, C + G, H, W)
        new = new + self.scale2(self.binary_conv2(self.sign2(self.bn2(y))))
        return torch.cat([x, new], dim=1)


def conv_bn_relu(
    in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


def transition(in_channels: int, out_channels: int, pools: bool) -> nn.Sequential:
    """BN -> max pooling -> ReLU -> real 1x1: (N, C, H, W) -> (N, C', ceil(H/2), ceil(W/2)).

    H and W stay where it does not pool.
    """
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.MaxPool2d(2, ceil_mode=True) if pools else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
    )


class MeliusNet29(nn.Module):
    """(N, 3, H, W) images -> (N, num_classes) logits; 48 of its convolutions may be binary.

    Its options are those of `models.layers.NetworkOptions`; the gradient of Sign is 1 on
    |x| <= 1.3.  The 8 groups of its stem must divide 32 * `width`.  For `small_images` there is no
    max pooling in the stem and before the last stage.
    """

    def __init__(self, num_classes: int = 1000, activation_ste: str = "clip_1.3", **options):
        super().__init__()
        options = NetworkOptions(activation_ste=activation_ste, **options)
        small = options.small_images
        half, growth, *after_transitions = options.scaled(CHANNELS, groups=8)
        self.stem = nn.Sequential(
            *conv_bn_relu(3, half, stride=2),
            *conv_bn_relu(half, half, groups=4),
            *conv_bn_relu(half, growth, groups=8),
            nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages, channels = nn.Sequential(), growth
        for pairs, after in zip(PAIRS, [*after_transitions, None], strict=True):
            for _ in range(pairs):
                self.stages.append(DenseImprovementPair(channels, growth, options))
                channels += growth
            if after:
                is_last = after == after_transitions[-1]
                self.stages.append(transition(channels, after, pools=not (small and is_last)))
                channels = after
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = GlobalAvgPool()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.stages(self.stem(x))  # (N, 64, H/4, W/4) -> (N, 640, H/32, W/32)
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))  # (N, num_classes)
