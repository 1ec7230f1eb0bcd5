"""What a run leaves and computes, its speed and place apart, compared bit by bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from process import leftovers

from utils.checkpoint.checkpoint import BEST, NEWEST, read_checkpoint
from utils.run.errors import UserError
from utils.run.logging import RECORDS, read_records


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


def without_speed(records: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if "per_second" not in k} for record in records]


def checkpoint_content(path: Path) -> dict[str, Any]:
    content = dict(read_checkpoint(path).content)
    del content["config"]
    return content | {"history": without_speed(content["history"])}


def position(path: Path) -> tuple[int, int]:
    """The last epoch finished in a checkpoint, and the iterations done of the next one."""
    content = read_checkpoint(path).content
    return content["epoch"], content.get("unfinished", {"iteration": 0})["iteration"]


def run_content(folder: Path) -> dict[str, Any]:
    """Newest and best checkpoint and the records of a run."""
    checkpoints = {name: checkpoint_content(folder / name) for name in (NEWEST, BEST)}
    return checkpoints | {RECORDS: without_speed(read_records(folder))}


def run_difference(whole: Path, folder: Path) -> str:
    """What a broken and continued run lost against an unbroken one; empty for nothing."""
    try:
        where = difference(run_content(whole), run_content(folder))
    except UserError as error:
        return f"lost: {error}"
    if files := leftovers(folder):
        return f"lost: {files[0]} is unfinished"
    return where and f"lost: {where} differs from the unbroken run"


def assert_same_run(whole: Path, folder: Path) -> None:
    problem = run_difference(whole, folder)
    assert not problem, problem


def assert_same_checkpoint(left: Path, right: Path) -> None:
    where = difference(checkpoint_content(left), checkpoint_content(right))
    assert not where, where
