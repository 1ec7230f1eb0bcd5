"""Checkpoints: written whole or not at all, sealed, read as data only, loaded strictly.

A checkpoint has the released keys, `epoch` (0-based, the last one finished), `state_dict`,
`best_top1_acc` and `optimizer`, and what an exact continuation needs besides: `config`, `rng`,
`history`, the record of each epoch so far, and `measures`, what the live measures have counted.
One written within an epoch also has `unfinished`: the `iteration`s done of the epoch after the last
finished one, and of each of the `processes` its running sums and random state.
"""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.config import Config
from utils.distributed import Process, from_main
from utils.errors import InputError
from utils.files import is_there, write_whole
from utils.packing import SUFFIX, read_packed
from utils.sealing import is_intact, seal

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
        epoch = self._number("epoch")
        return None if epoch is None else int(epoch)

    @property
    def top1(self) -> float | None:
        """The best validation accuracy up to then, in percent."""
        return self._number("best_top1_acc")

    def _number(self, name: str) -> float | None:
        value = self.content.get(name)
        try:
            return None if value is None else float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged: its {name} is not a number") from error

    @cached_property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the file's SHA-256."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def __str__(self) -> str:
        named = {None: "unknown epoch", -1: "within the first epoch"}
        epoch = named.get(self.epoch, f"epoch {self.epoch}")
        top1 = "unknown top-1" if self.top1 is None else f"top-1 {self.top1:.2f} %"
        return f"{self.path} ({self.layout}, {epoch}, {top1}, sha256 {self.digest}...)"


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Besides this repo's layout: the released one, whose keys DataParallel prefixed with `module.`
    (taken off here), a bare state dict, and a packed file.

    Raises:
        InputError: no such file, not what was written, not a checkpoint, or more than data.
    """
    path = Path(path)
    if path.suffix == SUFFIX and is_there(path) and path.is_file():
        state, content = read_packed(path)
        return Checkpoint(path, "packed", state, content)
    content = _read_data(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    if "state_dict" not in content:
        content = {"state_dict": content}
    state = content["state_dict"]
    if not (isinstance(state, dict) and state and all(map(_is_entry, state.items()))):
        raise InputError(f"{path} is not a checkpoint: it has no state_dict of tensors")
    if "config" in content:
        layout = "this repo's layout"
    else:
        layout = "released layout" if len(content) > 1 else "state dict alone"
        if any(key.endswith(".weights") for key in state):
            layout += " with flat kernels"
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return Checkpoint(path, layout, state, content)


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and torch.is_tensor(item[1])


def _read_data(path: Path) -> Any:
    try:
        if not is_intact(path):
            raise InputError(
                f"{path} is damaged or truncated: it does not fit the SHA-256 it was written with;"
                " fetch or write it again"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path} does not exist") from error
    except OSError as error:
        raise InputError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise InputError(
                f"{path} is refused: it names code to run, and a checkpoint is read as data only"
            ) from error
        raise InputError(
            f"{path} is not a checkpoint, or a damaged or truncated one"
            f" ({type(error).__name__}): fetch or write it again"
        ) from error


def load_strictly(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load every tensor of `model` from a checkpoint, in which nothing may be missing or left over.

    The flat binary kernels of the older released layout, `...weights` of shape (N, 1), are given
    the name and shape they have in `model`.

    Raises:
        InputError: names the first keys that do not fit; `model` is unchanged.
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
    found = [
        f"{words} {len(keys)} tensors ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for words, keys in problems.items()
        if keys
    ]
    if found:
        raise InputError(
            f"{checkpoint.path} does not fit this {type(model).__name__}: it {' and '.join(found)};"
            " check model, width and the number of classes in the data"
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
    """Write a checkpoint's content whole or not at all, sealed with its SHA-256."""

    def write(file: BinaryIO) -> None:
        torch.save(content, file)
        seal(file)

    write_whole(path, write, before_replacing)


def write_newest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the newest checkpoint of a run; the one it replaces becomes the previous one."""
    newest = folder / NEWEST

    def keep_previous() -> None:
        # A damaged one was not gone on from: what is kept must be what can be.
        if newest.exists() and is_intact(newest):
            newest.replace(folder / PREVIOUS)

    write_checkpoint(newest, content, keep_previous)


def run_content(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    history: list[dict[str, Any]],
    measures: Mapping[str, Any] | None,
    unfinished: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint of a run holds.

    Args:
        history: the record of each epoch so far.
        measures: state of the live measures.
        unfinished: how far the next epoch has come; None between epochs.
    """
    content = {
        "epoch": history[-1]["epoch"] if history else -1,
        "state_dict": model.state_dict(),
        "best_top1_acc": max((record["val_top1"] for record in history), default=0.0),
        "optimizer": optimizer.state_dict(),
        "config": asdict(config),
        "rng": rng_state(),
        "history": history,
        "measures": measures,
    }
    return content | ({"unfinished": unfinished} if unfinished else {})


def kept(folder: Path | str, epoch: int) -> Path:
    """Where `keep_epochs` leaves the checkpoint of an epoch."""
    return Path(folder) / f"epoch_{epoch}.pth.tar"


@dataclass
class Resumed:
    """Where a run goes on: nothing done yet, unless a checkpoint says otherwise.

    start: the checkpoint in words; empty without one.
    iteration: batches done of the epoch after `history`'s last.
    sums: state of the running sums over this process's share of them.
    """

    start: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    measures: Mapping[str, Any] | None = None
    iteration: int = 0
    sums: Mapping[str, Any] | None = None


def resume(config: Config, process: Process, model: nn.Module, optimizer: Optimizer) -> Resumed:
    """Restore the newest checkpoint of `config.save`, or the one before if it is damaged.

    Raises:
        InputError: both are, or the folder holds a run with settings that compute something else.
    """
    read: list[Checkpoint] = []  # by the main process, while it looked for an intact one
    path, problem = from_main(process, lambda: _newest_intact(Path(config.save), read))
    if path is None:
        return Resumed()
    checkpoint = read[0] if read else read_checkpoint(path)
    content = checkpoint.content
    differences = config.differences(content.get("config", {}))
    if differences:
        raise InputError(
            f"{checkpoint.path} is of a run with other settings, {', '.join(differences)}:"
            " continue with the same ones, or pass --save with another folder"
        )
    load_strictly(model, checkpoint)
    try:
        optimizer.load_state_dict(content["optimizer"])
        _set_rng_state(content["rng"])
        resumed = Resumed("", content["history"], content["measures"])
        if "unfinished" in content:
            resume_within_epoch(resumed, content["unfinished"], process)
        resumed.start = f"{_told(resumed)} of this run, which goes on{problem}"
        return resumed
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{checkpoint.path} was not written by a run of this repo and cannot be continued"
            f" ({error!r}): pass --save with another folder"
        ) from error


def _newest_intact(folder: Path, read: list[Checkpoint]) -> tuple[Path | None, str]:
    """Where the checkpoint to go on from is, None without any, and what is wrong with a newer one.

    Args:
        read: gets the checkpoint.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    problems = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path.exists():
            try:
                read.append(read_checkpoint(path))
                return path, "".join(f"; warning: {problem}" for problem in problems)
            except InputError as error:
                problems.append(error)
    if problems:
        raise problems[0]
    return None, ""


def resume_within_epoch(resumed: Resumed, unfinished: Mapping[str, Any], process: Process) -> None:
    """Restore what each process had by itself; of another number, the main one takes all sums."""
    resumed.iteration = unfinished["iteration"]
    peers = unfinished["processes"]
    if len(peers) == process.world_size:
        own = peers[process.rank]
        _set_rng_state(own["rng"])
        resumed.sums = own["sums"]
    elif process.is_main:
        total = sum(peer["sums"]["sums"] for peer in peers)
        resumed.sums = {**peers[0]["sums"], "sums": total}


def _told(resumed: Resumed) -> str:
    finished = f"epoch {resumed.history[-1]['epoch']}" if resumed.history else "the beginning"
    further = f" and {resumed.iteration} iterations" if resumed.iteration else ""
    return finished + further


def rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def write_released(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint in the released layout, for the original code; tensors bit for bit."""
    content = {
        "epoch": checkpoint.epoch or 0,
        "state_dict": {f"module.{key}": value for key, value in checkpoint.state.items()},
        "best_top1_acc": torch.tensor(checkpoint.top1 or 0.0, dtype=torch.float64),
        "optimizer": checkpoint.content.get("optimizer", {}),
    }
    write_checkpoint(path, content)
