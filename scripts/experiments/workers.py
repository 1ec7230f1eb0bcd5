"""Processes that train runs, one run after another.

What a process has set up once serves all its runs: torch, a GPU, compiled code, a cached data set.
"""

import contextlib
import gc
import io
import os
import re
import signal
import subprocess
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from filelock import FileLock

from scripts.experiments.spec import ROOT, Run
from step1.train import train as train_step1
from step2.train import train as train_step2
from utils.checkpoint.manager import run_session
from utils.run.command_line import one_sentence
from utils.run.config import Config

TRAIN = {1: train_step1, 2: train_step2}


class Worker:
    """Trains runs in a process of its own; of several at a time each has one core and one GPU."""

    def __init__(self, number: int, of: int):
        self.arguments = number, of
        self.process = None
        self.run: Run | None = None  # that is being trained

    def start(self, run: Run, lock: FileLock) -> None:
        """Train `run`, or go on with it; `lock` is released at its end."""
        if not (self.process and self.process.is_alive()):
            context = get_context("spawn")
            self.connection, end = context.Pipe()
            self.process = context.Process(target=serve, args=(end, *self.arguments))
            self.process.start()
            end.close()
        print(f"{run.name}, seed {run.seed}: {run.folder}", flush=True)
        self.run, self.lock = run, lock
        self.connection.send(run)

    def has_ended(self) -> bool:
        """Whether the run has: finished, failed, or died with its process."""
        return self.connection.poll()

    def result(self) -> str:
        """Wait for the run's end; empty if it finished, or why not."""
        try:
            reason = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            reason = f"its process ended with code {self.process.exitcode}"
        if reason:
            self.process.join()  # it ends with a run that stops
        run, self.run = self.run, None
        self.lock.release()
        return f"run {run.name!r}, seed {run.seed}, stopped: {reason}" if reason else ""

    def interrupt(self) -> None:
        """Let the run that is being trained stop, saved where it is."""
        if self.run:
            self.process.terminate()

    def close(self) -> None:
        """Wait for the run's end, and end the process."""
        if self.run:
            self.result()
        if self.process:
            self.connection.close()
            self.process.join()


def serve(connection: Connection, number: int, of: int) -> None:
    """Train each run that comes, and send back why it stopped, if it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; `interrupt` sends SIGTERM
    gpus = torch.cuda.device_count()
    if of > 1:
        torch.set_num_threads(1)
    if of > 1 and gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus]
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            train_on_all_gpus(run) if of == 1 and is_divided(run.config, gpus) else train(run)
            connection.send("")
        except Exception as error:  # after some, this process can use its GPU no more
            connection.send(one_sentence(error) or type(error).__name__)
            return


def is_divided(config: Config, gpus: int) -> bool:
    """Whether several GPUs share the run's batches; BN needs those of a small data set whole."""
    return gpus > 1 and not config.cache_images and config.batch_size % gpus == 0


def train(run: Run) -> None:
    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, run_session(run.config) as dist:
        TRAIN[run.step](run.config, dist)
    gc.collect()  # cycles keep the loader, and so its processes


def train_on_all_gpus(run: Run) -> None:
    """In a process for each GPU.

    Raises:
        RuntimeError: it stopped; the message says why.
    """
    programs = [ROOT / "utils" / "launch.py", ROOT / f"step{run.step}" / "train.py"]
    command = [sys.executable, *programs, *run.arguments]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        _, errors = process.communicate()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if process.returncode:
        # torchrun has its own lines after it.
        reasons = re.findall("^error: (.*)", errors, re.MULTILINE)
        raise RuntimeError(reasons[0] if reasons else f"code {process.returncode}")
