"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from utils.errors import InputError


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file that then replaces `path`; on any failure `path` stays as it was.

    Raises:
        InputError: the file system refuses (no space, no permission, no folder).
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise InputError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, force: bool) -> None:
    """Before any work: the folder of `path` is there, and a file that exists is kept.

    Raises:
        InputError: no such folder, or `path` exists and `force` is off.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not force:
        raise InputError(f"{path} exists and is kept: choose another name, or pass --force")
