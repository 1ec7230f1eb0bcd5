"""Golden numbers of the released code: how its tensors are filled, and reading the files.

`fill` gives every tensor from an integer hash, so the recorded networks need no weight files.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


def read(case: str) -> dict:
    return json.loads((FOLDER / f"{case}.json").read_text())


def read_layout(case: str) -> dict[str, list[int]]:
    return json.loads((FOLDER / f"{case}.layout.json").read_text())


def hashed(shape, salt: int) -> Tensor:
    """u_i = ((i + salt * 1000003) * 2654435761 mod 2^32) / 2^32 - 0.5 for flat index i, float64."""
    shape = torch.Size(shape)
    i = torch.arange(shape.numel(), dtype=torch.int64)
    # The product stays below 2^63 because both factors are first taken mod 2^32 and split.
    left = (i + salt * 1000003) % 2**32
    low, high = left % 2**16, left // 2**16
    product = (low * 2654435761 + ((high * 2654435761) % 2**16) * 2**16) % 2**32
    return (product.double() / 2**32 - 0.5).reshape(shape)


def fill_value(key: str, shape, salt: int) -> Tensor:
    u = hashed(shape, salt)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        return 1 + 0.5 * u
    if key.endswith("running_mean"):
        return 0.2 * u
    if "prelu" in key:
        return 0.25 + 0.2 * u
    if "bn" in key or ".downsample.2" in key:
        return 1 + 0.2 * u if key.endswith("weight") else 0.2 * u
    if key.endswith("bias"):
        return 0.4 * u
    return (0.1 if len(shape) == 4 else 0.05) * u


def fill(model: nn.Module, salt: int) -> nn.Module:
    """Load the hashed tensors into `model` and make it float64."""
    layout = {key: value.shape for key, value in model.state_dict().items()}
    state = {key: fill_value(key, shape, salt + j) for j, (key, shape) in enumerate(layout.items())}
    model.double().load_state_dict(state, strict=True)
    return model


def images(case: dict) -> Tensor:
    return 4 * hashed((case["batch"], 3, *case["size"]), case["salt"] + 7001)


def teacher_logits(case: dict, num_classes: int = 1000) -> Tensor:
    return 8 * hashed((case["batch"], num_classes), case["salt"] + 7002)
