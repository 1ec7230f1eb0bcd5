"""Small layers that the binary networks share."""

import torch
from torch import Tensor, nn


class ChannelShift(nn.Module):
    """x + b with one learned b per channel, starting at 0: (N, C, H, W) -> (N, C, H, W).

    `bias` is stored as (1, C, 1, 1), the released layout; being 4-D it falls into the released
    code's weight-decay group.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias
