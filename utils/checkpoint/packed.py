"""Packed files: safetensors with 1 bit per binary weight, the other tensors as they are.

A binary kernel (O, I, kH, kW) of exactly -1 and +1 is stored under its own key as its bits, +1 as
1, in C order, the first weight in the lowest bit of the first byte.  The header holds the kernels'
shapes, what is needed to build the network again, and the SHA-256 of all this and of the tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.checkpoint.files import atomic_write
from utils.metrics import pack_signs, unpack_signs
from utils.run.errors import UserError

SUFFIX = ".safetensors"
FORMAT = "adambnn packed 2"
WITHOUT_DIGEST = "adambnn packed 1"


def write_packed(
    path: Path,
    state: Mapping[str, Tensor],
    binary: set[str],
    content: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a state dict whose `binary` keys hold exactly -1 and +1.

    Args:
        content: JSON-able facts that reading gives back (configuration, epoch, accuracy).
        dtype: float32 or float16, of the other floating-point tensors.

    Raises:
        UserError: a value is too large for `dtype`.
    """
    tensors, shapes = {}, {}
    for key, value in state.items():
        if key in binary:
            tensors[key], shapes[key] = pack_signs(value > 0), list(value.shape)
        else:
            tensors[key] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
            if value.isfinite().all() and not tensors[key].isfinite().all():
                raise UserError(f"{key} has values too large for {dtype}: keep float32")
    header = {"format": FORMAT, "binary": json.dumps(shapes), "content": json.dumps(content)}
    header["sha256"] = _digest(header, tensors)
    atomic_write(path, lambda file: file.write(safetensors.torch.save(tensors, header)))


def read_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in float32, and the content written with it.

    Raises:
        UserError: not a packed file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header.get("format") not in (FORMAT, WITHOUT_DIGEST):
            raise UserError(f"{path} is a safetensors file, but not one packed by this repo")
        if header["format"] == FORMAT and header.pop("sha256") != _digest(header, tensors):
            raise ValueError("its SHA-256 is another")
        shapes = json.loads(header["binary"])
        content = json.loads(header["content"])
        state = {}
        for key, value in tensors.items():
            if key in shapes:
                state[key] = unpack_signs(value, shapes[key]).float() * 2 - 1
            else:
                state[key] = value.float() if value.is_floating_point() else value
        return state, content
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a packed file, or a damaged one ({type(error).__name__}):"
            " fetch or write it again"
        ) from error


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's texts and of each tensor's name, type, shape and bytes."""
    parts = [[name, header[name]] for name in sorted(header)]
    parts += [[key, str(tensors[key].dtype), list(tensors[key].shape)] for key in sorted(tensors)]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for key in sorted(tensors):
        digest.update(tensors[key].numpy())
    return digest.hexdigest()
