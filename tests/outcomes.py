"""What a run left and computed, compared bit by bit with an unbroken run's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint.checkpoint import BEST, NEWEST, read_checkpoint
from utils.run.errors import UserError
from utils.run.logging import RECORDS, read_records

Outcome = str  # empty when survived, else what was lost or unclear


def difference(left: Any, right: Any, where: str = "") -> str:
    """Where two nested values with tensors first differ; empty if they are bit-identical."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return f"{where} has other keys"
        pairs = ((left[key], right[key], f"{where}/{key}") for key in left)
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return f"{where} has another length"
        pairs = ((a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(left, right, strict=True)))
    elif torch.is_tensor(left) and torch.is_tensor(right):
        return "" if torch.equal(left, right) else where
    else:
        return "" if left == right else where
    return next(filter(None, (difference(*pair) for pair in pairs)), "")


def without_speed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if "per_second" not in name}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves and computes, speed and place apart.

    Raises:
        ValueError: the records have a gap or one twice, or lack what this is to compare.
    """
    found = {}
    for name in (NEWEST, BEST):
        content = dict(read_checkpoint(folder / name).content)
        del content["config"]
        content["history"] = [without_speed(record) for record in content["history"]]
        found[name] = content
    found[RECORDS] = [without_speed(record) for record in read_records(folder)]
    if [record["epoch"] for record in found[RECORDS]] != list(range(len(found[RECORDS]))):
        raise ValueError(f"{folder / RECORDS} has a gap, or an epoch twice")
    if not all({"ff_ratio", "c2i_ratio"} <= record.keys() for record in found[RECORDS]):
        raise ValueError(f"{folder / RECORDS} lacks FF or C2I")
    return found


def compared(whole: Path, folder: Path) -> Outcome:
    try:
        differs = difference(outcome(whole), outcome(folder))
    except (UserError, OSError, ValueError) as error:
        return f"lost: {error}"
    return differs and f"lost: {differs} differs from the unbroken run"
