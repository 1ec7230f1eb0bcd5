"""Binary ResNet-18 networks: ReActNet-R18, Bi-Real-18, StrongBaseline-R18, Real-to-Binary-R18.

All have a real 7x7 stem and four stages of four one-convolution blocks, each with a shortcut.
"""

import torch
from torch import Tensor, nn

from models.layers import AvgPool2x2, GlobalAvgPool, LearnableBias, NetworkOptions
from utils.binarize import RPReLU

CHANNELS = (64, 128, 256, 512)  # of the four stages at width 1


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """x itself; where the shape changes, average pooling, a real-valued 1x1 convolution and BN."""
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        AvgPool2x2() if stride == 2 else nn.Identity(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ReActBlock(nn.Module):
    """RSign -> binary 3x3 -> BN -> + shortcut -> RPReLU.

    Released parameter names: `move0` is the threshold of RSign, Sign(x + b); `move1`, `prelu`,
    `move2` are RPReLU, PReLU(x + b1) + b2.
    """

    scale_folds_into = (("binary_conv", "bn1"),)

    def __init__(self, in_channels, out_channels, stride, size, options):
        super().__init__()
        self.move0 = LearnableBias(in_channels)
        self.sign = options.sign()
        self.binary_conv = options.conv(in_channels, out_channels, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.move1 = LearnableBias(out_channels)
        self.prelu = RPReLU(out_channels)
        self.move2 = LearnableBias(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        binary = self.sign(x, self.move0.bias)
        x = self.bn1(self.binary_conv(binary)) + self.downsample(x)  # (N, C', H/s, W/s)
        return self.prelu(x, self.move1.bias, self.move2.bias)


class BiRealBlock(nn.Module):
    """Sign -> binary 3x3 -> BN -> + shortcut (Liu et al., ECCV 2018).

    Sign is the only nonlinearity: without `binary_activations` a ReLU stands in its place.
    """

    scale_folds_into = (("binary_conv", "bn1"),)

    def __init__(self, in_channels, out_channels, stride, size, options):
        super().__init__()
        self.sign = options.sign() if options.binary_activations else nn.ReLU()
        self.binary_conv = options.conv(in_channels, out_channels, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        return self.bn1(self.binary_conv(self.sign(x))) + self.downsample(x)  # (N, C', H/s, W/s)


class LearnedScale(nn.Module):
    """y = x * c * h * w, the product of three learned vectors over channels, rows and columns.

    Vectors start at 1.  At another size than (C, H, W) was built for, c alone scales.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.channel = nn.Parameter(torch.ones(channels, 1, 1))
        self.row = nn.Parameter(torch.ones(1, size, 1))
        self.column = nn.Parameter(torch.ones(1, 1, size))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        if x.shape[-2:] != (self.row.numel(), self.column.numel()):
            # Every parameter has a gradient, which processes that train together wait for.
            return x * (self.channel + 0 * (self.row.sum() + self.column.sum()))
        return x * (self.channel * self.row * self.column)


class StrongBaselineBlock(nn.Module):
    """BN -> Sign -> binary 3x3 -> learned scale -> PReLU -> + shortcut (Martinez et al. 2020)."""

    scale_folds_into = (("binary_conv", "scale"),)

    def __init__(self, in_channels, out_channels, stride, size, options):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.sign = options.sign()
        self.binary_conv = options.conv(in_channels, out_channels, 3, stride, padding=1)
        self.scale = LearnedScale(out_channels, size)
        self.prelu = RPReLU(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = self.scale(self.binary_conv(self.sign(self.bn1(x))))  # (N, C', H/s, W/s)
        return self.prelu(y) + self.downsample(x)


class RealToBinaryBlock(StrongBaselineBlock):
    """The same with a gate, which the real-valued input of Sign opens (Martinez et al. 2020).

    BN -> Sign -> binary 3x3 -> learned scale -> * G -> PReLU -> + shortcut;
    G = sigmoid(W2 relu(W1 mean_hw(BN(x)))), one number per image and output channel.
    """

    def __init__(self, in_channels, out_channels, stride, size, options):
        super().__init__(in_channels, out_channels, stride, size, options)
        hidden = max(in_channels // 8, 1)
        self.gate = nn.Sequential(
            GlobalAvgPool(),  # (N, C, 1, 1)
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.Sigmoid(),  # (N, C', 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        normed = self.bn1(x)
        y = self.scale(self.binary_conv(self.sign(normed)))  # (N, C', H/s, W/s)
        return self.prelu(y * self.gate(normed)) + self.downsample(x)


class BinaryResNet18(nn.Module):
    """(N, 3, H, W) images -> (N, num_classes) logits; subclasses name their block.

    Its options are those of `models.layers.NetworkOptions`.  For `small_images` there is no max
    pooling, and the last stage has stride 1.
    """

    block: type[nn.Module]  # made of in_channels, out_channels, stride, output pixels and options
    stem_has_prelu = False

    def __init__(self, num_classes: int = 1000, **options):
        super().__init__()
        options = NetworkOptions(**options)
        small = options.small_images
        channels = options.scaled(CHANNELS)
        before = channels[0]
        self.conv1 = nn.Conv2d(3, before, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.prelu = RPReLU(before) if self.stem_has_prelu else nn.Identity()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)

        size = 16 if small else 56  # pixels before the first stage, of images of 32 or 224
        strides = (1, 2, 2, 1 if small else 2)
        for stage, (after, stride) in enumerate(zip(channels, strides, strict=True), start=1):
            size //= stride
            blocks = [self.block(before, after, stride, size, options)]
            blocks += [self.block(after, after, 1, size, options) for _ in range(3)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            before = after
        self.avgpool = GlobalAvgPool()
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.maxpool(self.prelu(self.bn1(self.conv1(x))))  # (N, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 512, H/32, W/32)
        return self.fc(self.avgpool(x).flatten(1))  # (N, num_classes)


class ReActNetR18(BinaryResNet18):
    """ReActNet on ResNet-18 (Liu et al., ECCV 2020)."""

    block = ReActBlock


class BiRealR18(BinaryResNet18):
    """Bi-Real Net 18 (Liu et al., ECCV 2018)."""

    block = BiRealBlock


class StrongBaselineR18(BinaryResNet18):
    """The strong baseline of Martinez et al. (ICLR 2020), which the paper's analysis trains.

    Its gradient of Sign is the clip, where the other networks take the polynomial.
    """

    block = StrongBaselineBlock
    stem_has_prelu = True

    def __init__(self, num_classes: int = 1000, activation_ste: str = "clip", **options):
        super().__init__(num_classes, activation_ste=activation_ste, **options)


class RealToBinaryR18(StrongBaselineR18):
    """Real-to-Binary Net (Martinez et al., ICLR 2020), without its attention loss."""

    block = RealToBinaryBlock
