"""What a run leaves behind in its folder: log, curves, one JSON line per epoch, configuration."""

import contextlib
import logging
import operator
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.checkpoint import BEST
from utils.config import Config, as_yaml
from utils.distributed import Process
from utils.engine import Meter
from utils.errors import InputError
from utils.files import write_whole
from utils.measures import HISTOGRAM_LIMIT
from utils.records import write_records

LINE_EVERY = 100  # batches


class RunLog:
    """The log of one run in `config.save`; processes other than the main one stay silent.

    log.txt         plain lines, the same as on the terminal, added to by every restart
    metrics.jsonl   one JSON object per epoch
    config.yaml     the resolved configuration
    tensorboard/    scalars
    """

    def __init__(self, config: Config, process: Process, history: list[dict[str, Any]]):
        """Open the folder, creating it, and make its records and scalars those of `history`.

        What an earlier process wrote of later epochs is replaced, and what it had not come to write
        of the last one is added.

        Raises:
            InputError: the folder cannot be created or written.
        """
        self.folder = Path(config.save)
        self.is_main = process.is_main
        self._logger = logging.getLogger("adambnn")
        self._logger.setLevel(logging.INFO if self.is_main else logging.CRITICAL)
        self._logger.propagate = False
        if not self.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = logging.FileHandler(self.folder / "log.txt")
            self._curves = SummaryWriter(
                self.folder / "tensorboard", purge_step=max(len(history) - 1, 0)
            )
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", "TensorBoard takes names in UTF-8 only")
            raise InputError(
                f"cannot write to {self.folder} ({reason}):"
                " pass --save with a folder that can be written"
            ) from error
        self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._logger.addHandler(self._file)
        self._logger.addHandler(logging.StreamHandler(sys.stdout))
        write_whole(self.folder / "config.yaml", lambda file: file.write(as_yaml(config).encode()))
        # A full disk is met again, and told, where a checkpoint or a record cannot be written.
        logging.raiseExceptions = False
        if history:
            self._record(history)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        if self.is_main:
            with contextlib.suppress(OSError):
                self._curves.close()
            for handler in list(self._logger.handlers):
                self._logger.removeHandler(handler)
                if handler is self._file:
                    with contextlib.suppress(OSError):
                        handler.close()

    def line(self, text: str) -> None:
        self._logger.info(text)

    def opening(self, config: Config, process: Process, start: Any, groups: str) -> None:
        """Configuration, commit, versions, device, seed, decay groups, where the weights start."""
        self.line("configuration\n" + as_yaml(config).rstrip())
        self.line(f"commit {_commit()}")
        self.line(
            f"python {platform.python_version()}, torch {torch.__version__},"
            f" torchvision {torchvision.__version__}, numpy {numpy.__version__}"
        )
        self.line(f"device {_device_name(process.device)}, {process.world_size} process(es)")
        self.line(f"seed {config.seed}")
        self.line(f"parameters: {groups}")
        self.line(f"weights start from {start}")

    def closing(self, history: list[dict[str, Any]]) -> None:
        """The best epoch and where its weights are.

        Raises:
            InputError: the records could not be written, and still cannot.
        """
        if self.is_main:
            write_records(self.folder, history)
        best = max(history, key=lambda record: record["val_top1"])
        self.line(
            f"finished: best val top-1 {best['val_top1']:.2f} % at epoch {best['epoch']},"
            f" {self.folder / BEST}"
        )

    def progress(self, title: str, first: int = 0):
        """A `Progress` for the engine: a bar on a terminal, a line every 100 batches elsewhere.

        Args:
            first: batches done before, by a run that goes on.
        """

        def track(batches: Iterable, meter: Meter) -> Iterator:
            shows_bar = self.is_main and sys.stderr.isatty()
            bar = tqdm(batches, title, initial=first, leave=False, disable=not shows_bar)
            for done, batch in enumerate(bar, start=first + 1):
                yield batch
                if self.is_main and done % LINE_EVERY == 0:
                    now = meter.results()
                    text = f"loss {now['loss']:.4f}, top-1 {now['top1']:.2f} %"
                    bar.set_postfix_str(text)
                    if not shows_bar:
                        self.line(f"{title} {done}/{len(bar)}: {text}")

        return track

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Report the last record of `history`, and write all of them to metrics.jsonl."""
        if not self.is_main:
            return
        record = history[-1]
        self.line(
            f"epoch {record['epoch']}: learning rate {record['learning_rate']:.3e},"
            f" train loss {record['train_loss']:.4f} top-1 {record['train_top1']:.2f} %,"
            f" val loss {record['val_loss']:.4f} top-1 {record['val_top1']:.2f} %"
            f" top-5 {record['val_top5']:.2f} % on {record['val_images']} images,"
            f" {record['train_images_per_second']:.0f} images/s"
        )
        if "ff_ratio" in record:
            self.line(
                f"epoch {record['epoch']}: FF ratio {record['ff_ratio']:.3e},"
                f" C2I ratio {record['c2i_ratio']:.4f}"
            )
        try:
            self._record(history)
        except (InputError, OSError) as error:
            self.line(f"warning: {error}; training goes on, the next epoch's record tries again")

    def _record(self, history: list[dict[str, Any]]) -> None:
        """The last record as scalars and histograms, all of them as lines."""
        write_records(self.folder, history)
        self._add_curves("", history[-1], history[-1]["epoch"])
        self._curves.flush()

    def _add_curves(self, prefix: str, record: dict[str, Any], epoch: int) -> None:
        """A scalar for each number, `layers/NAME/...` for nested ones, histograms for counts."""
        for name, value in record.items():
            if isinstance(value, dict):
                self._add_curves(f"{prefix}{name}/", value, epoch)
            elif name == "latent_histogram":
                self._add_histogram(f"{prefix}{name}", value, epoch)
            elif name != "epoch":
                self._curves.add_scalar(f"{prefix}{name}", value, epoch)

    def _add_histogram(self, tag: str, counts: list[int], epoch: int) -> None:
        width = 2 * HISTOGRAM_LIMIT / len(counts)
        edges = [-HISTOGRAM_LIMIT + width * (i + 1) for i in range(len(counts))]
        centres = [edge - width / 2 for edge in edges]
        self._curves.add_histogram_raw(
            tag,
            min=-HISTOGRAM_LIMIT,
            max=HISTOGRAM_LIMIT,
            num=sum(counts),
            sum=sum(map(operator.mul, counts, centres)),
            sum_squares=sum(n * x * x for n, x in zip(counts, centres, strict=True)),
            bucket_limits=edges,
            bucket_counts=counts,
            global_step=epoch,
        )


def epoch_record(
    epoch: int,
    learning_rate: float,
    trained: dict[str, float],
    validated: dict[str, float],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """One record: epoch, learning_rate, train_loss, ..., val_loss, ..., and the live measures."""
    return {
        "epoch": epoch,
        "learning_rate": learning_rate,
        **{f"train_{name}": value for name, value in trained.items()},
        **{f"val_{name}": value for name, value in validated.items()},
        **measured,
    }


def _commit() -> str:
    """The repo's commit, `+changes` if the working tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = {"capture_output": True, "text": True, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return commit + (" +changes" if changed.strip() else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
