"""The smallest binary network that shows what the paper's Fig. 6 shows: two nodes, two weights.

The loss is Sign(x) + Sign(y), with the clip estimator.  From y = 2.4 its gradient in y would be 0
for ever, so the nodes see data, as nodes do: each sample shifts the two pre-activations by
Gaussian noise.  Far from 0 few samples are unsaturated, and the gradient in y is small and rare.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.binarize import sign

START = (0.1, 2.4)


def descend(
    optimizer: str,
    learning_rate: float,
    options: Mapping[str, Any],
    steps: int,
    noise: float,
    batch_size: int,
    seed: int,
) -> Tensor:
    """(x, y) before each of `steps` updates and after the last, (steps + 1, 2).

    Args:
        optimizer: name in `torch.optim`, `options` further arguments of its constructor.
        noise: standard deviation of what a sample adds to each pre-activation.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    update = getattr(torch.optim, optimizer)([weights], lr=learning_rate, **options)
    path = [weights.detach().clone()]
    for _ in range(steps):
        samples = noise * torch.randn(batch_size, 2, generator=generator, dtype=torch.float64)
        update.zero_grad()
        sign(weights + samples, ste="clip").sum(1).mean().backward()  # of Sign(x) + Sign(y)
        update.step()
        path.append(weights.detach().clone())
    return torch.stack(path)
