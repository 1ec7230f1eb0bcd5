"""The records of a run: one JSON object per epoch, a line each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import write_whole

RECORDS = "metrics.jsonl"


def write_records(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the records of all epochs so far, whole or not at all."""
    lines = "".join(json.dumps(record) + "\n" for record in history)
    write_whole(folder / RECORDS, lambda file: file.write(lines.encode()))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records in the folder of a run.

    Raises:
        InputError: there are none, or they are damaged.
    """
    path = folder / RECORDS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is not the folder of a run: cannot read {path}") from error
