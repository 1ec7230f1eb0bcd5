"""Saving and restoring a run: after each epoch, by the clock within it, and on signals.

A checkpoint has the released keys, `epoch` (0-based, the last one finished), `state_dict`,
`best_top1_acc` and `optimizer`, and what an exact continuation needs besides: `config`, `rng`,
`history`, the record of each epoch so far, and `measures`, the state of the binary metrics.  One
written within an epoch also has `unfinished`: the `iteration`s done of the epoch in progress, and
of each of the `processes` its running sums and random state.

That is all, because the images are a function of (seed, epoch, index): the position in the data is
the number of iterations done, and no state of a loader or of its workers has to be saved.
"""

import contextlib
import copy
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from utils.checkpoint.checkpoint import (
    BEST,
    NEWEST,
    PREVIOUS,
    load_strictly,
    read_checkpoint,
    write_checkpoint,
)
from utils.checkpoint.files import lock_directory
from utils.checkpoint.seal import is_intact
from utils.metrics import BinaryMetrics, Meter, NoMetrics
from utils.run.config import Config
from utils.run.distributed import (
    DistEnv,
    all_reduce_any,
    broadcast_from_rank0,
    gather,
    init_distributed,
)
from utils.run.errors import Preempted, UserError, explain_limits
from utils.run.state import TrainState

SAVE = (signal.SIGUSR2,)
SAVE_AND_LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

logger = logging.getLogger("adambnn")


@contextlib.contextmanager
def run_session(config: Config) -> Iterator[DistEnv]:
    """Join the other processes, lock the run's folder, and explain what the machine cannot hold.

    Raises:
        UserError: another run has the folder `save`, it cannot be written, or no GPU is usable.
    """
    with init_distributed(config.device) as dist, contextlib.ExitStack() as stack:
        folder = Path(config.save)
        broadcast_from_rank0(dist, lambda: stack.enter_context(lock_directory(folder)))
        with explain_limits(config, dist.world_size):
            yield dist


def epoch_checkpoint_path(folder: Path | str, epoch: int) -> Path:
    """Where `keep_epochs` leaves the checkpoint of an epoch."""
    return Path(folder) / f"epoch_{epoch}.pth.tar"


@dataclass
class CheckpointManager:
    """Saves a run after each epoch, every `checkpoint_minutes` and on signals; a context.

    SIGUSR2 saves after the current iteration.  SIGTERM, SIGUSR1 and the first Ctrl-C save and leave
    (`Preempted`); the second Ctrl-C leaves at once.  Signals during validation are answered after
    the next iteration.  Where a checkpoint cannot be written, training goes on with a warning and
    the next one tries again.
    """

    config: Config
    dist: DistEnv
    model: nn.Module
    optimizer: Optimizer
    metrics: BinaryMetrics | NoMetrics
    state: TrainState

    def __post_init__(self):
        self.folder = Path(self.config.save)
        self.pending: dict[Path, dict[str, Any]] = {}
        self.signals: set[int] = set()
        self.last_save = time.monotonic()

    def resume(self) -> str:
        """Restore the newest checkpoint of the run, or the one before if it is damaged.

        Returns:
            Where the run goes on, in words; empty where there is no checkpoint.

        Raises:
            UserError: both are damaged, or of a run with settings that compute something else.
        """
        path, problem = broadcast_from_rank0(self.dist, lambda: _newest_intact(self.folder))
        if path is None:
            return ""
        checkpoint = read_checkpoint(path)
        content = checkpoint.content
        differences = self.config.differences(content.get("config", {}))
        if differences:
            advice = "continue with the same ones, or pass --save with another folder"
            if any(difference.startswith("epochs ") for difference in differences):
                advice += (
                    "; the learning rates of all epochs depend on epochs, so a run cannot be made"
                    f" longer: to train on, pass --init_from {path} with another --save"
                )
            raise UserError(
                f"{path} is of a run with other settings, {', '.join(differences)}: {advice}"
            )
        load_strictly(self.model, checkpoint)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            self.metrics.load_state_dict(content["measures"])
            self.state.history.extend(content["history"])
            _set_rng_state(content["rng"])
            if "unfinished" in content:
                restore_mid_epoch(self.state, content["unfinished"], self.dist)
        except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{checkpoint.path} was not written by a run of this repo and cannot be continued"
                f" ({error!r}): pass --save with another folder"
            ) from error
        history, iteration = self.state.history, self.state.iteration
        position = f"epoch {history[-1]['epoch']}" if history else "the beginning"
        position += f" and {iteration} iterations" if iteration else ""
        return f"{position} of this run, which goes on{problem}"

    def __enter__(self) -> "CheckpointManager":
        self.previous_handlers = {}
        if threading.current_thread() is threading.main_thread():
            numbers = (*SAVE, *SAVE_AND_LEAVE)
            self.previous_handlers = {n: signal.signal(n, self._on_signal) for n in numbers}
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if kind in (None, Preempted):  # an unwritten checkpoint is no exit code 75
            for path, content in self.pending.items():
                _write(path, content)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in self.signals:
                raise KeyboardInterrupt
            # Not print: it may be what the signal interrupted.
            os.write(2, b"leaving after this iteration; Ctrl-C again to leave at once\n")
        self.signals.add(number)

    def on_step_end(self, state: TrainState) -> None:
        """Save if it is time or was asked for; the same decision on every process.

        Raises:
            Preempted: a signal asked the run to leave, and it has been saved.
        """
        is_time = time.monotonic() - self.last_save >= 60 * self.config.checkpoint_minutes
        save, leave = all_reduce_any(
            (self.dist.is_rank0 and is_time) or not self.signals.isdisjoint(SAVE),
            not self.signals.isdisjoint(SAVE_AND_LEAVE),
        )
        if save or leave:
            state.before_save()
            # BN statistics are not gathered: DDP gives all processes rank 0's before each step.
            own = {"sums": state.meter.state_dict(), "rng": rng_state()}
            processes = gather(self.dist, own)
            self._save(unfinished={"iteration": state.iteration, "processes": processes})
            self.signals.difference_update(SAVE)
        if leave:
            done = f"after {state.iteration} iterations of epoch {state.epoch}"
            logger.info(f"stopped on request {done}: the same command goes on")
            raise Preempted(done)

    def on_epoch_end(self, state: TrainState) -> None:
        """Save the epoch whose record is the last one of the history, also as the best or kept."""
        copies = []
        epoch, top1 = (state.history[-1][name] for name in ("epoch", "val_top1"))
        if top1 > max((record["val_top1"] for record in state.history[:-1]), default=-1.0):
            copies.append(self.folder / BEST)
        if epoch in (self.config.keep_epochs or ()):
            copies.append(epoch_checkpoint_path(self.folder, epoch))
        self._save(copies)

    def _save(self, copies: Sequence[Path] = (), **unfinished: Any) -> None:
        """Write what is pending from earlier failures, then the copies, then the newest.

        The newest comes last: interrupted in between, the epoch is repeated and all are written.
        """
        self.last_save = time.monotonic()
        if not self.dist.is_rank0:
            return
        history = self.state.history
        content = {
            "epoch": history[-1]["epoch"] if history else -1,
            "state_dict": self.model.state_dict(),
            "best_top1_acc": max((record["val_top1"] for record in history), default=0.0),
            "optimizer": self.optimizer.state_dict(),
            "config": asdict(self.config),
            "rng": rng_state(),
            "history": history,
            "measures": self.metrics.state_dict(),
            **unfinished,
        }
        newest = self.folder / NEWEST
        self.pending.pop(newest, None)
        self.pending |= dict.fromkeys([*copies, newest], content)
        try:
            while self.pending:
                path = next(iter(self.pending))
                _write(path, self.pending[path])
                del self.pending[path]
        except UserError as error:
            logger.warning(f"warning: {error}; training goes on, the next checkpoint tries again")
            # Copied, because the tensors are those of a model that is trained on.
            self.pending = {path: copy.deepcopy(kept) for path, kept in self.pending.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; the newest one that it replaces becomes the previous one."""

    def keep_previous() -> None:
        # Not a damaged one: then the run went on from the previous one, which stays.
        if path.exists() and is_intact(path):
            path.replace(path.with_name(PREVIOUS))

    write_checkpoint(path, content, keep_previous if path.name == NEWEST else None)


def _newest_intact(folder: Path) -> tuple[Path | None, str]:
    """Where the checkpoint to go on from is, None without any, and what is wrong with a newer one.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    problems = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path.exists():
            try:
                read_checkpoint(path)
                return path, "".join(f"; warning: {problem}" for problem in problems)
            except UserError as error:
                problems.append(error)
    if problems:
        raise problems[0]
    return None, ""


def restore_mid_epoch(state: TrainState, unfinished: Mapping[str, Any], dist: DistEnv) -> None:
    """Restore what each process had by itself; of another number, rank 0 takes all sums."""
    state.iteration = unfinished["iteration"]
    peers = unfinished["processes"]
    if len(peers) == dist.world_size:
        own = peers[dist.rank]
        _set_rng_state(own["rng"])
        state.meter = Meter(own["sums"])
    elif dist.is_rank0:
        total = sum(peer["sums"]["sums"] for peer in peers)
        state.meter = Meter({**peers[0]["sums"], "sums": total})


def rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
