"""How far a run has come: one object, owned by `train()` of each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from utils.metrics import Meter


@dataclass
class TrainState:
    """The position of a run, and who is told when it moves.

    history: one record per finished epoch, as in metrics.jsonl.
    iteration: updates done of the epoch in progress.
    meter: loss and accuracy of this process's share of these iterations.
    hooks: called in order after each iteration and each epoch; none changes this object.
    before_save: raises if what is to be saved is not finite.
    """

    meter: Meter = field(default_factory=Meter)
    history: list[dict[str, Any]] = field(default_factory=list)
    iteration: int = 0
    hooks: Sequence["Hook"] = ()
    before_save: Callable[[], None] = lambda: None

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return len(self.history)

    def end_step(self) -> None:
        self.iteration += 1
        for hook in self.hooks:
            hook.on_step_end(self)

    def end_epoch(self, rate: float, trained: dict, validated: dict, measured: dict) -> None:
        """Record epoch, learning_rate, train_loss, ..., val_loss, ..., and the binary metrics."""
        record = {"epoch": self.epoch, "learning_rate": rate}
        record |= {f"train_{name}": value for name, value in trained.items()}
        record |= {f"val_{name}": value for name, value in validated.items()}
        self.history.append(record | measured)
        self.iteration = 0
        self.meter = Meter()
        for hook in self.hooks:
            hook.on_epoch_end(self)


class Hook(Protocol):
    """What logging, metrics and checkpoints implement."""

    def on_step_end(self, state: TrainState) -> None: ...

    def on_epoch_end(self, state: TrainState) -> None: ...
