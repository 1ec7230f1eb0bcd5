"""Interleaved rounds, fresh processes, and the machine's name."""

import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from timeit import default_timer, timeit
from typing import TypeVar

import torch

from utils.data.loader import usable_cores

Side = TypeVar("Side")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP_ROUNDS = 2  # not counted; the first one compiles


def clock() -> float:
    """Seconds, once the device has finished what was started on it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return default_timer()


seconds_of = partial(timeit, timer=clock, number=1)


def interleaved(
    sides: Mapping[Side, Callable[[], object]], rounds: int, measure: Callable = seconds_of
) -> dict[Side, list]:
    """What `measure` takes of each side in each round, all sides in turn, after two to warm up.

    Args:
        measure: of a side, called with it.
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


def processor() -> str:
    """Cores, the CPU's name and whether it counts bits in vectors, where Linux lists it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    popcount = "with" if "avx512_vpopcntdq" in fields.get("flags", "").split() else "without"
    name = fields.get("model name", platform.processor())
    return f"{usable_cores()} cores of {name}, {popcount} AVX-512 VPOPCNTDQ"
