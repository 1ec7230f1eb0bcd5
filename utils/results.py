"""The folder of a measurement: `results.json`, and the table and the picture made of it."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from utils.checkpoint.files import atomic_write
from utils.run.command_line import Parser
from utils.run.errors import UserError

RESULTS, TABLE = "results.json", "table.md"


def add_output_options(parser: Parser) -> None:
    """`--output` and `--redraw`, for `measure_and_draw`."""
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--redraw", action="store_true", help="table and picture, nothing measured")


def measure_and_draw(
    arguments: argparse.Namespace,
    picture: str,
    measured: Callable[[argparse.Namespace], Mapping[str, Any]],
    as_table: Callable[[Mapping[str, Any]], str],
    drawn: Callable[[Mapping[str, Any]], Figure],
) -> None:
    """Write what `measured` gives, unless it is only to be redrawn; print the table.

    Raises:
        UserError: no such folder, or results to be redrawn that are missing or damaged.
    """
    if not arguments.output.is_dir():
        raise UserError(f"there is no folder {arguments.output}: make it first")
    path = arguments.output / RESULTS
    if not arguments.redraw:
        _write_text(path, json.dumps(measured(arguments), indent=1) + "\n")
    try:
        results = json.loads(path.read_text())
        table, figure = as_table(results), drawn(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: leave --redraw out") from error
    _write_text(arguments.output / TABLE, table)
    atomic_write(
        arguments.output / picture, lambda file: figure.savefig(file, format="png", dpi=120)
    )
    print(table)


def _write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))


def processor() -> str:
    """Cores, the CPU's name and whether it counts bits in vectors, where Linux tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    popcount = "with" if "avx512_vpopcntdq" in facts.get("flags", "").split() else "without"
    name = facts.get("model name", platform.processor())
    return f"{os.cpu_count()} cores of {name}, {popcount} AVX-512 VPOPCNTDQ"


def accelerator() -> str:
    """The GPU's name; without one, the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
