"""A run that nothing breaks: saved within an epoch, stopped on request, never led astray unseen.

What a continuation needs is little, because the images are a function of (seed, epoch, index): the
position in the data is the number of iterations done (`utils.data.TrainBatches`), and no state of a
loader or of its workers has to be saved, as torchdata's stateful loader would.
"""

import contextlib
import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from utils.checkpoint import (
    BEST,
    NEWEST,
    Resumed,
    kept,
    rng_state,
    run_content,
    write_checkpoint,
    write_newest,
)
from utils.config import Config
from utils.data import TrainBatches
from utils.distributed import Process, any_process, from_main, gather
from utils.engine import Meter, NotFinite
from utils.errors import InputError, Stopped
from utils.files import held_folder
from utils.live import LiveMeasures, NoMeasures
from utils.runlog import RunLog

SAVE = (signal.SIGUSR2,)
SAVE_AND_LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def run_folder(save: str, process: Process) -> Iterator[None]:
    """Hold the folder `save` for this run; a second run on it is refused."""
    with contextlib.ExitStack() as stack:
        from_main(process, lambda: stack.enter_context(held_folder(Path(save))))
        yield


class Keeper:
    """Saves a run after each epoch, every `checkpoint_minutes` and on signals; a context.

    SIGUSR2 saves after the current iteration.  SIGTERM, SIGUSR1 and the first Ctrl-C save and leave
    (`Stopped`); the second Ctrl-C leaves at once.  Signals during validation are answered after the
    next iteration.  Where a checkpoint cannot be written, training goes on with a warning and
    the next one tries again.

    Leaving the context, it says in one sentence what a batch that was not finite consisted of.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        log: RunLog,
        model: nn.Module,
        optimizer: Optimizer,
        measures: LiveMeasures | NoMeasures,
        resumed: Resumed,
    ):
        self.config = config
        self.process = process
        self.log = log
        self.model = model
        self.optimizer = optimizer
        self.measures = measures
        self.history = resumed.history
        self.iteration = resumed.iteration
        self.meter = Meter(process.device, resumed.sums)
        self.saved = time.monotonic()
        self.owed: dict[Path, dict[str, Any]] = {}
        self.signals: set[int] = set()

    def __enter__(self) -> "Keeper":
        self.earlier = {}
        if threading.current_thread() is threading.main_thread():
            self.earlier = {n: signal.signal(n, self._note) for n in (*SAVE, *SAVE_AND_LEAVE)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        if isinstance(error, NotFinite):
            raise InputError(self._where(error)) from error
        if kind is None and self.owed:
            for path, content in self.owed.items():
                _write(path, content)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in self.signals:
                raise KeyboardInterrupt
            # Not print: it may be what the signal interrupted.
            os.write(2, b"leaving after this iteration; Ctrl-C again to leave at once\n")
        self.signals.add(number)

    def start_epoch(self, epoch: int, batches: TrainBatches) -> None:
        """Let `batches` give those of `epoch` that have not been trained on."""
        batches.epoch = epoch
        batches.first = self.iteration
        self.batches = batches

    def after_step(self) -> None:
        """Count an iteration; save if it is time; the same decision on every process."""
        self.measures.after_step()
        self.iteration += 1
        is_time = time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes
        save, leave = any_process(
            (self.process.is_main and is_time) or not self.signals.isdisjoint(SAVE),
            not self.signals.isdisjoint(SAVE_AND_LEAVE),
        )
        if save or leave:
            self._save(self._unfinished())
            self.signals.difference_update(SAVE)
        if leave:
            done = f"after {self.iteration} iterations of epoch {self.batches.epoch}"
            self.log.line(f"stopped on request {done}: the same command goes on")
            raise Stopped(done)

    def save_epoch(self) -> None:
        """Save the epoch whose record was just added to the history."""
        self.iteration = 0
        self.meter = Meter(self.process.device)
        self._save(None)

    def _unfinished(self) -> dict[str, Any]:
        """How far the epoch has come, and what differs from process to process.

        BN statistics do not: DistributedDataParallel gives all of them rank 0's before each step.
        """
        own = {"sums": self.meter.state_dict(), "rng": rng_state()}
        return {"iteration": self.iteration, "processes": gather(self.process, own)}

    def _save(self, unfinished: dict[str, Any] | None) -> None:
        """Write what is owed from earlier failures, then this state, each also as the best or kept.

        The newest comes last: interrupted in between, the epoch is repeated and all are written.
        """
        self.saved = time.monotonic()
        if not self.process.is_main:
            return
        folder = Path(self.config.save)
        content = run_content(
            self.config,
            self.model,
            self.optimizer,
            self.history,
            self.measures.state_dict(),
            unfinished,
        )
        self.owed.pop(folder / NEWEST, None)
        if unfinished is None:
            epoch, top1 = (self.history[-1][name] for name in ("epoch", "val_top1"))
            if top1 > max((record["val_top1"] for record in self.history[:-1]), default=-1.0):
                self.owed[folder / BEST] = content
            if epoch in (self.config.keep_epochs or ()):
                self.owed[kept(folder, epoch)] = content
        self.owed[folder / NEWEST] = content
        try:
            while self.owed:
                path = next(iter(self.owed))
                _write(path, self.owed[path])
                del self.owed[path]
        except InputError as error:
            self.log.line(f"warning: {error}; training goes on, the next checkpoint tries again")
            # Copied, because the tensors are those of a model that is trained on.
            self.owed = {path: copy.deepcopy(content) for path, content in self.owed.items()}

    def _where(self, error: NotFinite) -> str:
        images = self.batches.whole_batches()[self.iteration].tolist()
        return (
            f"{error} at epoch {self.batches.epoch}, iteration {self.iteration}, images"
            f" {', '.join(map(str, images))}; the weights were not changed by it:"
            " look at these images, or start again with another learning_rate"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    if path.name == NEWEST:
        write_newest(path.parent, content)
    else:
        write_checkpoint(path, content)
