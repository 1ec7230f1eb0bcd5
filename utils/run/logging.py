"""What a run leaves in its folder: log, curves, one JSON line per epoch, configuration."""

import contextlib
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from utils.checkpoint.checkpoint import BEST
from utils.checkpoint.files import atomic_write
from utils.metrics import HISTOGRAM_LIMIT
from utils.precision import emulates_bfloat16
from utils.run.config import Config, as_yaml
from utils.run.distributed import DistEnv
from utils.run.errors import UserError
from utils.run.state import TrainState

RECORDS = "metrics.jsonl"
LINE_EVERY = 100  # iterations
PACE_AFTER = 50  # iterations, or at the end of the first epoch
# Recommended on GPUs; they round differently, so they are no defaults.
FAST = {"precision": "bfloat16", "compile": True, "channels_last": True}


class RunLog(contextlib.AbstractContextManager):
    """The log of one run in `config.save`, a context; processes other than rank 0 stay silent.

    log.txt         plain lines, the same as on the terminal, added to by every restart
    metrics.jsonl   one JSON object per epoch
    config.yaml     the resolved configuration
    tensorboard/    scalars and histograms

    Args:
        state: what earlier processes recorded of later epochs is replaced by its history.
        iterations: of an epoch.
    """

    def __init__(self, config: Config, dist: DistEnv, state: TrainState, iterations: int):
        self.config = config
        self.dist = dist
        self.iterations = iterations
        self.step_ends: list[float] | None = []  # of the first iterations, until the pace is known
        self.started = time.perf_counter()
        self.folder = Path(config.save)
        self.logger = logging.getLogger("adambnn")
        self.logger.setLevel(logging.INFO if dist.is_rank0 else logging.CRITICAL)
        self.logger.propagate = False
        if not dist.is_rank0:
            return
        purge_step = max(state.epoch - 1, 0)
        self.curves = SummaryWriter(self.folder / "tensorboard", purge_step=purge_step)
        file = logging.FileHandler(self.folder / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.logger.addHandler(file)
        self.logger.addHandler(logging.StreamHandler(sys.stdout))
        # A full disk is met again, and reported, where a checkpoint or a record cannot be written.
        logging.raiseExceptions = False
        text = as_yaml(config)
        atomic_write(self.folder / "config.yaml", lambda file: file.write(text.encode()))
        if state.history:
            self._record(state.history)

    def __exit__(self, *_) -> None:
        if self.dist.is_rank0:
            with contextlib.suppress(OSError):
                self.curves.close()
            for handler in list(self.logger.handlers):
                self.logger.removeHandler(handler)
                with contextlib.suppress(OSError):
                    handler.close()

    def opening(self, start: Any, groups: str) -> None:
        """Log what the run depends on, where its weights come from and its parameter groups."""
        for line in (
            "configuration\n" + as_yaml(self.config).rstrip(),
            f"commit {_commit()}",
            f"python {platform.python_version()}, torch {torch.__version__},"
            f" torchvision {torchvision.__version__}, numpy {numpy.__version__}",
            f"device {_device_name(self.dist.device)}, {self.dist.world_size} process(es)",
            f"seed {self.config.seed}",
            f"parameters: {groups}",
            f"weights start from {start}",
        ):
            self.logger.info(line)

    def on_step_end(self, state: TrainState) -> None:
        if not self.dist.is_rank0:
            return
        if self.step_ends is not None:
            self.step_ends.append(time.perf_counter())
            if len(self.step_ends) == PACE_AFTER or state.iteration == self.iterations:
                self._pace(state)
        if state.iteration % LINE_EVERY == 0:
            now = state.meter.results()
            self.logger.info(
                f"epoch {state.epoch} train {state.iteration}/{self.iterations}:"
                f" loss {now['loss']:.4f}, top-1 {now['top1']:.2f} %"
            )

    def _pace(self, state: TrainState) -> None:
        """Log how fast this process's first iterations were, and what that means for the run."""
        ends, self.step_ends = self.step_ends, None
        # The first one waits for workers and compilation.
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1) if ends[1:] else ends[0] - self.started
        left = (self.config.epochs - state.epoch) * self.iterations - state.iteration
        line = (
            f"the first {len(ends)} iterations took {ends[-1] - self.started:.1f} s:"
            f" {self.config.batch_size / seconds:.0f} images/s,"
            f" {left * seconds / 3600:.1f} hours of training left"
        )
        if self.dist.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.dist.device)
            line += f", {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB of GPU memory in use"
        if faster := faster_options(self.config, self.dist.device):
            line += f"; faster with {faster}"
        self.logger.info(line)

    def on_epoch_end(self, state: TrainState) -> None:
        """Log the last record of the history, and write all of them to metrics.jsonl."""
        if not self.dist.is_rank0:
            return
        record = state.history[-1]
        self.logger.info(
            f"epoch {record['epoch']}: learning rate {record['learning_rate']:.3e},"
            f" train loss {record['train_loss']:.4f} top-1 {record['train_top1']:.2f} %,"
            f" val loss {record['val_loss']:.4f} top-1 {record['val_top1']:.2f} %"
            f" top-5 {record['val_top5']:.2f} % on {record['val_images']} images,"
            f" {record['train_images_per_second']:.0f} images/s"
        )
        if "ff_ratio" in record:
            self.logger.info(
                f"epoch {record['epoch']}: FF ratio {record['ff_ratio']:.3e},"
                f" C2I ratio {record['c2i_ratio']:.4f}"
            )
        try:
            self._record(state.history)
        except (UserError, OSError) as error:
            self.logger.warning(
                f"warning: {error}; training goes on, the next epoch's record tries again"
            )

    def closing(self, state: TrainState) -> None:
        """Log the best epoch and where its weights are.

        Raises:
            UserError: the records could not be written, and still cannot.
        """
        if self.dist.is_rank0:
            write_records(self.folder, state.history)
        best = max(state.history, key=lambda record: record["val_top1"])
        self.logger.info(
            f"finished: best val top-1 {best['val_top1']:.2f} % at epoch {best['epoch']},"
            f" {self.folder / BEST}"
        )

    def _record(self, history: Sequence[Mapping[str, Any]]) -> None:
        """The last record as scalars and histograms, all of them as lines."""
        write_records(self.folder, history)
        self._add_curves("", history[-1], history[-1]["epoch"])
        self.curves.flush()

    def _add_curves(self, prefix: str, record: dict[str, Any], epoch: int) -> None:
        """A scalar for each number, `layers/NAME/...` for nested ones, histograms for counts."""
        for name, value in record.items():
            if isinstance(value, dict):
                self._add_curves(f"{prefix}{name}/", value, epoch)
            elif name == "latent_histogram":
                self._add_histogram(f"{prefix}{name}", value, epoch)
            elif name != "epoch":
                self.curves.add_scalar(f"{prefix}{name}", value, epoch)

    def _add_histogram(self, tag: str, counts: list[int], epoch: int) -> None:
        edges = numpy.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, len(counts) + 1)
        centres = (edges[:-1] + edges[1:]) / 2
        self.curves.add_histogram_raw(
            tag,
            min=-HISTOGRAM_LIMIT,
            max=HISTOGRAM_LIMIT,
            num=sum(counts),
            sum=float(centres @ counts),
            sum_squares=float(centres**2 @ counts),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts,
            global_step=epoch,
        )


def write_records(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace the records in the folder of a run by `history`."""
    lines = "".join(json.dumps(record) + "\n" for record in history)
    atomic_write(folder / RECORDS, lambda file: file.write(lines.encode()))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records in the folder of a run.

    Raises:
        UserError: there are none, or they are damaged.
    """
    path = folder / RECORDS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not the folder of a run: cannot read {path}") from error


def faster_options(config: Config, device: torch.device) -> str:
    """Options, as on the command line, with which training would be faster on `device`."""
    best = dict(FAST) if device.type == "cuda" else {}
    if emulates_bfloat16(device):
        best["precision"] = "float32"
    asked = {name: str(getattr(config, name)) for name in best}
    off = [f"--{name} {v}" for name, v in best.items() if not asked[name].startswith(str(v))]
    return " ".join(off).lower()


def _commit() -> str:
    """The repo's commit, `-dirty` if the working tree differs from it."""
    git = ("git", "describe", "--always", "--abbrev=40", "--dirty")
    here = Path(__file__).parent
    try:
        return subprocess.run(
            git, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
