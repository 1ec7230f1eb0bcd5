"""Interleaved rounds, fresh processes, and the machine's name."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

Side, Result = TypeVar("Side"), TypeVar("Result")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP_ROUNDS = 2  # not counted; the first one compiles


def clock() -> float:
    """Seconds, once the device has finished what was started on it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], object]) -> float:
    started = clock()
    run()
    return clock() - started


def interleaved(
    sides: Mapping[Side, Callable[[], object]], rounds: int, measure: Callable = seconds_of
) -> dict[Side, list]:
    """What `measure` takes of each side in each round, all sides in turn, after two to warm up.

    Args:
        measure: `operator.call` takes what the sides return.
    """
    values = {side: [] for side in sides}
    for _ in range(WARM_UP_ROUNDS + rounds):
        for side, run in sides.items():
            values[side].append(measure(run))
    return {side: measured[WARM_UP_ROUNDS:] for side, measured in values.items()}


def fresh_process(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """One new process, with further environment variables before its first call."""
    return ProcessPoolExecutor(1, get_context("spawn"), update_environment, (environment,))


def update_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def call_in(process: ProcessPoolExecutor, function: Callable[..., Result], *arguments) -> Result:
    return process.submit(function, *arguments).result()


def processor() -> str:
    """Cores, the CPU's name and whether it counts bits in vectors, where Linux lists it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    popcount = "with" if "avx512_vpopcntdq" in fields.get("flags", "").split() else "without"
    name = fields.get("model name", platform.processor())
    return f"{os.cpu_count()} cores of {name}, {popcount} AVX-512 VPOPCNTDQ"


def accelerator() -> str:
    """The GPU's name; without one, the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
