"""Files that are written whole or not at all, and a folder that one run at a time may write."""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import InputError

LOCK = ".lock"
_UNFINISHED = re.compile(r"\..+\.unfinished-\d+")


def is_folder(path: Path | os.DirEntry) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to itself, a name that is too long
        return False


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # as above
        return False


def write_whole(
    path: Path,
    write: Callable[[BinaryIO], None],
    before_replacing: Callable[[], None] | None = None,
) -> None:
    """Let `write` fill a file that then replaces `path`; on any failure `path` stays as it was.

    Args:
        before_replacing: called once the new file is whole and on the disk.

    Raises:
        InputError: the file system refuses (no space, no permission, no folder).
    """
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        with unfinished.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_replacing:
            before_replacing()
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


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it: no other process can until this one leaves the block or dies.

    What an earlier process was writing when it was killed is removed.  The lock is POSIX's, which
    the kernel releases with its process, also over NFS, and which loading workers do not inherit
    (they outlive a killed process by seconds).  Where the file system knows no locks there is none.

    Raises:
        InputError: another process holds the folder, or it cannot be created or written.
    """
    is_new = not is_there(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}):"
            " pass --save with a folder that can be written"
        ) from error
    try:
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        # Removed while still held: who opened it meanwhile finds another file there, or none.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            if is_new:
                folder.rmdir()  # which keeps whatever a run left in it
        file.close()


def _locked(path: Path) -> BinaryIO:
    """The file at `path`, locked; it is the one that is there once the lock is had."""
    while True:
        file = path.open("wb")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise InputError(
                    f"{path.parent} is in use by another run:"
                    " wait for it, or pass --save with another folder"
                ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def check_output(path: Path, force: bool) -> None:
    """Before any work: the folder of `path` is there, and a file that exists is kept.

    Raises:
        InputError: no such folder, or `path` exists and `force` is off.
    """
    if not is_folder(path.parent):
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if is_there(path) and not force:
        raise InputError(f"{path} exists and is kept: choose another name, or pass --force")
