"""Programs run in a process of their own, and whether they ended clearly."""

import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.sealing import is_intact

MEMORY = 12 << 30  # bytes of addresses that a run may have: sizes too large fail at once
LONGEST = 300.0  # seconds that a run may take
FORK = multiprocessing.get_context("fork")  # torch is loaded once, by this process


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it printed."""

    code: int | None
    out: str
    err: str

    def complaint(self) -> str:
        """What was unclear about it; nothing about success, or exit code 2 with one sentence."""
        errors = [line for line in self.err.splitlines(True) if line.startswith("error: ")]
        if "Traceback" in self.out + self.err:
            return f"a traceback, {self.err.splitlines()[-1]}"
        if self.code == 0 and not errors:
            return ""
        if self.code == 2 and len(errors) == 1 and self.err.endswith(errors[0]):
            return ""
        return f"exit code {self.code} and {self.err!r}"


def run_apart(main: Callable[[], None], arguments: Sequence[str], folder: Path) -> Ended:
    """Run a program in a process of its own, which works in `folder`."""
    streams = folder / "stdout", folder / "stderr"
    process = FORK.DistEnv(target=_run, args=(main, arguments, folder, *streams))
    process.start()
    process.join(LONGEST)
    code = process.exitcode
    process.kill()
    process.join()
    return Ended(code, *(path.read_text(errors="backslashreplace") for path in streams))


def _run(main: Callable, arguments: Sequence[str], folder: Path, out: Path, err: Path) -> None:
    sys.stdout = out.open("w", encoding="utf-8")
    sys.stderr = err.open("w", encoding="utf-8", errors="backslashreplace")
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(stream.fileno(), number)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    sys.argv = ["program.py", *arguments]
    torch.set_num_threads(1)
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def leftovers(folder: Path) -> list[Path]:
    """Files below a folder, if there is one, that are half written or not whole."""
    hidden = [path for path in folder.rglob(".*") if path.is_file()]
    return hidden + [path for path in folder.rglob("*.pth.tar") if not is_intact(path)]
