"""Loss surfaces around a trained network (Li et al., NeurIPS 2018), the paper's Fig. 1.

The loss at (alpha, beta) is that of the network with weights w + alpha * d1 + beta * d2.  For a
binary network w are the latent weights, and Sign and the scale follow from the moved ones.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

Direction = Mapping[str, Tensor]


@torch.no_grad()
def filter_normalised_direction(model: nn.Module, generator: torch.Generator) -> Direction:
    """Parameter name -> random d of its shape, each filter as long as the network's own.

    d[o] <- d[o] / |d[o]| * |w[o]| with d Gaussian, for each output filter (row of `fc`) o.  Biases,
    BN and the shifts, 4-D though they are, have none.

    Args:
        generator: on the CPU, so that a seed means the same direction on every device.
    """
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("bias"):
            random = torch.randn(parameter.shape, generator=generator).to(parameter)
            axes = tuple(range(1, parameter.ndim))
            own, drawn = (vector_norm(w, dim=axes, keepdim=True) for w in (parameter, random))
            direction[name] = random * (own / drawn)  # (O, ...) * (O, 1, ...)
    return direction


@torch.no_grad()
def move_to(
    model: nn.Module,
    centre: Mapping[str, Tensor],
    directions: tuple[Direction, Direction],
    alpha: float,
    beta: float,
) -> None:
    """Set the model's weights to centre + alpha * d1 + beta * d2, all else to `centre`.

    Args:
        centre: a copy of the model's state dict, buffers and all.
    """
    first, second = directions
    moved = {name: centre[name] + alpha * first[name] + beta * second[name] for name in first}
    model.load_state_dict({**centre, **moved})


def roughness(losses: np.ndarray) -> np.ndarray:
    """|loss - mean of its four neighbours| on a grid, same shape; 0 at the rim."""
    rough = np.zeros_like(losses)
    neighbours = losses[2:, 1:-1] + losses[:-2, 1:-1] + losses[1:-1, 2:] + losses[1:-1, :-2]
    rough[1:-1, 1:-1] = np.abs(losses[1:-1, 1:-1] - neighbours / 4)
    return rough
