"""Checkpoint files: written atomically with a checksum, read as data only, loaded strictly."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from utils.binarize import has_exact_weights
from utils.checkpoint.files import atomic_write, sha256
from utils.checkpoint.packed import SUFFIX, read_packed
from utils.checkpoint.seal import is_intact, seal
from utils.run.errors import UserError

NEWEST = "checkpoint.pth.tar"
PREVIOUS = "previous.pth.tar"
BEST = "model_best.pth.tar"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file as read: its weights, and whatever else it carries."""

    path: Path
    layout: str
    state: dict[str, Tensor]
    content: Mapping[str, Any]

    @property
    def epoch(self) -> int | None:
        """The last epoch finished, counted from 0; -1 within the first one."""
        return self.content.get("epoch")

    @property
    def top1(self) -> float | None:
        """The best validation accuracy up to then, in percent; a tensor in released files."""
        top1 = self.content.get("best_top1_acc")
        return None if top1 is None else float(top1)

    @cached_property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the file's SHA-256."""
        return sha256(self.path)[:16]

    def __str__(self) -> str:
        named = {None: "unknown epoch", -1: "within the first epoch"}
        epoch = named.get(self.epoch, f"epoch {self.epoch}")
        top1 = "unknown top-1" if self.top1 is None else f"top-1 {self.top1:.2f} %"
        return f"{self.path} ({self.layout}, {epoch}, {top1}, sha256 {self.digest}...)"


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Besides this repo's layout: the released one, whose keys DataParallel prefixed with `module.`
    (taken off here), BCDNet's, a bare state dict, and a packed file.

    Raises:
        UserError: no such file, not what was written, not a checkpoint, or more than data.
    """
    path = Path(path)
    if path.suffix == SUFFIX and path.is_file():
        state, content = read_packed(path)
        return Checkpoint(path, "packed", state, content)
    content = _read_data(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # BCDNet's name for it
        content = {**content, "state_dict": content["model"]}
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    state = content["state_dict"] if isinstance(content, dict) else None
    is_state = isinstance(state, dict) and state and all(isinstance(key, str) for key in state)
    if not is_state or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{path} is not a checkpoint: it has no state_dict of tensors")
    if "config" in content:
        layout = "this repo's layout"
    else:
        layout = "released layout" if len(content) > 1 else "state dict alone"
        if any(key.endswith(".weights") for key in state):
            layout += " with flat kernels"
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "fc_dist.weight" in state:
        layout += " with two heads, averaged"  # as BCDNet predicts
        for name in ("weight", "bias"):
            state[f"fc.{name}"] = (state[f"fc.{name}"] + state.pop(f"fc_dist.{name}")) / 2
    return Checkpoint(path, layout, state, content)


def _read_data(path: Path) -> Any:
    try:
        intact = is_intact(path)
        content = torch.load(path, map_location="cpu", weights_only=True) if intact else None
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise UserError(
                f"{path} is refused: it names code to run, and a checkpoint is read as data only;"
                " where you trust it, save its state_dict alone by torch.save"
            ) from error
        raise UserError(
            f"{path} is not a checkpoint, or a damaged or truncated one"
            f" ({type(error).__name__}): fetch or write it again"
        ) from error
    if not intact:
        raise UserError(
            f"{path} is damaged or truncated: it does not fit the SHA-256 it was written with;"
            " fetch or write it again"
        )
    return content


def load_initial_weights(model: nn.Module, path: str | None) -> str:
    """Load the checkpoint at `path`, if any; returns in words where the weights come from.

    Raises:
        UserError: as `read_checkpoint` and `load_strictly`.
    """
    if path is None:
        return "scratch"
    checkpoint = read_checkpoint(path)
    load_strictly(model, checkpoint)
    if has_exact_weights(model):
        return f"{checkpoint}; warning: all latent weights are -1 or +1, where few signs ever flip"
    return str(checkpoint)


def load_strictly(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load every tensor of `model` from a checkpoint, in which nothing may be missing or left over.

    The flat binary kernels of the older released layout, `...weights` of shape (N, 1), are given
    the name and shape they have in `model`.

    Raises:
        UserError: names the first keys that do not fit; `model` is unchanged.
    """
    own = model.state_dict()
    state = with_4d_kernels(checkpoint.state, own)
    problems = {
        "lacks": [key for key in own if key not in state],
        "has left over": [key for key in state if key not in own],
        "has another shape for": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    misfits = [
        f"{words} {len(keys)} tensors ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for words, keys in problems.items()
        if keys
    ]
    if misfits:
        raise UserError(
            f"{checkpoint.path} does not fit this {type(model).__name__}:"
            f" it {' and '.join(misfits)}; check model, width and the number of classes in the data"
        )
    model.load_state_dict(state, strict=True)


def with_4d_kernels(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], by_size: bool = True
) -> dict[str, Tensor]:
    """A state dict in which flat `...weights` have the names, and by size the shapes, of `own`."""
    renamed = {}
    for key, value in state.items():
        kernel = key.removesuffix("s")
        if key.endswith(".weights") and kernel in own:
            key = kernel
            if by_size and value.numel() == own[kernel].numel():
                value = value.reshape(own[kernel].shape)
        renamed[key] = value
    return renamed


def write_checkpoint(
    path: Path, content: Mapping[str, Any], before_replacing: Callable[[], None] | None = None
) -> None:
    """Write a checkpoint atomically, sealed with its SHA-256."""

    def write(file: BinaryIO) -> None:
        torch.save(content, file)
        seal(file)

    atomic_write(path, write, before_replacing)


def write_released(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint in the released layout, for the original code; tensors bit for bit."""
    content = {
        "epoch": checkpoint.epoch or 0,
        "state_dict": {f"module.{key}": value for key, value in checkpoint.state.items()},
        "best_top1_acc": torch.tensor(checkpoint.top1 or 0.0, dtype=torch.float64),
        "optimizer": checkpoint.content.get("optimizer", {}),
    }
    write_checkpoint(path, content)
