"""Programs run in a process of their own, and how they ended."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.checkpoint.files import LOCK
from utils.checkpoint.seal import is_intact

MEMORY = 12 << 30  # bytes of addresses that a run may have: sizes too large fail at once
TIMEOUT = 300.0  # seconds that a run may take
# Forked, torch is loaded once, by this process; where it may use a GPU, a fork cannot train.
FORK = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


@dataclass(frozen=True)
class Result:
    """How a program ended, and what it printed."""

    code: int | str | None
    out: str
    err: str

    def assert_one_sentence(self, *words: str) -> None:
        """It failed with one line on stderr that holds all `words`, and no traceback."""
        assert self.code != 0
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.out + self.err
        for word in words:
            assert word in self.err, self.err

    def problem(self) -> str:
        """Empty for success, and for exit code 2 with one sentence at the end of stderr."""
        errors = [line for line in self.err.splitlines(True) if line.startswith("error: ")]
        if "Traceback" in self.out + self.err:
            return f"a traceback, {self.err.splitlines()[-1]}"
        if self.code == 0 and not errors:
            return ""
        if self.code == 2 and len(errors) == 1 and self.err.endswith(errors[0]):
            return ""
        return f"exit code {self.code} and {self.err!r}"


def run_in_process(main: Callable[[], None], arguments: Sequence[str], folder: Path) -> Result:
    """Run a program in a process of its own, which works in `folder`."""
    streams = folder / "stdout", folder / "stderr"
    process = FORK.Process(target=_run, args=(main, arguments, folder, *streams))
    process.start()
    process.join(TIMEOUT)
    code = process.exitcode
    process.kill()
    process.join()
    return Result(code, *(path.read_text(errors="backslashreplace") for path in streams))


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
    """Files below a folder, if there is one, that are half written, and damaged checkpoints."""
    hidden = [path for path in folder.rglob(".*") if path.is_file() and path.name != LOCK]
    return hidden + [path for path in folder.rglob("*.pth.tar") if not is_intact(path)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def kill_a_child(parent: int, choose: Callable[[list[str]], str]) -> None:
    """Kill one of the processes that a process has started, if there is one."""
    if children := Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        os.kill(int(choose(children)), signal.SIGKILL)
