"""Files that are replaced atomically, and a folder that one run at a time may write."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from utils.run.errors import UserError

LOCK = ".lock"
UNFINISHED = ".unfinished"


def atomic_write(
    path: Path,
    write: Callable[[BinaryIO], None],
    before_replacing: Callable[[], None] | None = None,
) -> None:
    """Let `write` fill a file that then replaces `path`; on any failure `path` stays as it was.

    Args:
        before_replacing: called once the new file is complete and on the disk.

    Raises:
        UserError: the file system refuses (no space, no permission, no folder).
    """
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with unfinished.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_replacing:
            before_replacing()
        unfinished.replace(path)
        if os.name == "posix":  # makes the renaming survive a power cut
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it until this process leaves the block or dies.

    What an earlier process was writing when it was killed is removed.  The lock file stays: the
    lock is the operating system's, which ends with its process.

    Raises:
        UserError: another process has the folder, or it cannot be created or written.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another run: wait for it, or pass --save with another folder"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}):"
            " pass --save with a folder that can be written"
        ) from error
    try:
        for path in folder.glob(f".*{UNFINISHED}*"):
            path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if is_new and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
                (folder / LOCK).unlink()
                folder.rmdir()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(path: Path, force: bool) -> None:
    """Before any work: the folder of `path` is there, and a file that exists is kept.

    Raises:
        UserError: no such folder, or `path` exists and `force` is off.
    """
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not force:
        raise UserError(f"{path} exists and is kept: choose another name, or pass --force")
