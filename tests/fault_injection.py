"""Inject real faults into small runs: does the same command go on as if nothing had happened?

    python tests/fault_injection.py --rounds 100 --faults kill,pair --report FILE.md

kill         SIGKILL at a random moment, while saving too, and the same command again
pair         the same with two processes, both killed
rank         one of two processes under torchrun killed; the launcher goes on by itself
checkpoint   bits flipped, blocks overwritten, ends cut off or added, at random offsets
disk         a small tmpfs full, or the run's folder gone, for a while (needs the right to mount)
image        one training image with bits flipped or its end cut off

A round is survived if the run ends with the weights, optimizer state, best checkpoint and records
of an unbroken one; if reading a damaged checkpoint gives one sentence; if a damaged image is
decoded, or named in one sentence with exit code 2 and then replaced.  `lost` is anything else, but
`unclear` where only the message is at fault.  Each fault starts from the seed.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing import Process
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from compare import position, run_difference
from conftest import CLASSES, FROM_SCRATCH, TINY, command_line, start
from corruption import CORRUPTIONS, cut_the_end_off, flip_a_bit, flip_many_bits
from process import (
    FORK,
    TIMEOUT,
    free_port,
    kill_a_child,
    leftovers,
    run_in_process,
    wait_until,
)

from step2.train import main as train
from utils.checkpoint.checkpoint import NEWEST, PREVIOUS, read_checkpoint
from utils.checkpoint.files import UNFINISHED, atomic_write
from utils.data.shapes import draw_set
from utils.run.command_line import Parser, command, markdown_table, positive
from utils.run.errors import UserError

# A checkpoint after each iteration, three an epoch, so that kills meet the saving of many.
OPTIONS = {**TINY, **FROM_SCRATCH, "checkpoint_minutes": 0}
Outcome = str  # empty when survived, else what was lost or unclear


class Bench:
    """A folder with images, and the means to start and finish runs on them."""

    def __init__(self, folder: Path, rounds: int, seed: int):
        self.folder = folder
        self.rounds = rounds
        self.random = random.Random(seed)
        self.images = folder / "images"
        self.log = folder / "log"
        draw_set(self.images, CLASSES, {"train": 8, "val": 4}, "{}.jpg")

    def arguments(self, save: Path, **options: Any) -> list[str]:
        return command_line({**OPTIONS, "data": self.images, "save": save, **options})

    def start(self, arguments: list[str], processes: int = 1) -> list[Process]:
        """Start step 2 as `processes` peers that write to the log."""
        port = free_port()
        peers = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            environment = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            peer = FORK.Process(target=_train, args=(self.log, arguments, environment))
            peer.start()
            peers.append(peer)
        return peers

    def finish(self, arguments: list[str], processes: int = 1) -> None:
        peers = self.start(arguments, processes)
        peers[0].join(TIMEOUT)
        kill_all(peers)


def _train(log: Path, arguments: list[str], environment: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *arguments]
    train()


def kill_all(peers: Sequence[Process]) -> None:
    for peer in peers:
        peer.kill()
    for peer in peers:
        peer.join()


def kill(bench: Bench, processes: int = 1) -> Iterator[Outcome]:
    """One run, killed `rounds` times and then left alone."""
    whole, broken = bench.folder / "whole", bench.folder / "broken"
    epochs = max(bench.rounds, 3)
    started = time.monotonic()
    bench.finish(bench.arguments(bench.folder / "one_epoch", epochs=1), processes)
    seconds = time.monotonic() - started
    bench.finish(bench.arguments(whole, epochs=epochs), processes)
    arguments = bench.arguments(broken, epochs=epochs)
    reached, saving = (-1, 0), 0
    for _ in range(bench.rounds):
        peers = bench.start(arguments, processes)
        time.sleep(bench.random.uniform(0, 1.3 * seconds))
        kill_all(peers)
        saving += any(broken.glob(f".*{UNFINISHED}"))
        before = reached
        try:
            if paths := [path for name in (NEWEST, PREVIOUS) if (path := broken / name).exists()]:
                reached = position(paths[0])
            yield f"lost: back from {before} to {reached}" if reached < before else ""
        except UserError as error:
            yield f"lost: {error}"
    print(f"killed on the way to epoch {reached[0]} of {epochs}, {saving} times while saving")
    bench.finish(arguments, processes)
    yield run_difference(whole, broken)


def pair(bench: Bench) -> Iterator[Outcome]:
    return kill(bench, processes=2)


def rank(bench: Bench) -> Iterator[Outcome]:
    """Runs under torchrun, in each of which one process is killed."""
    whole = bench.folder / "whole"
    bench.finish(bench.arguments(whole, epochs=6), processes=2)
    for number in range(bench.rounds):
        folder = bench.folder / f"run{number}"
        with start("step2/train.py", *bench.arguments(folder, epochs=6)) as launcher:
            wait_until((folder / NEWEST).exists)
            time.sleep(bench.random.uniform(0, 1))
            kill_a_child(launcher.pid, bench.random.choice)
            out, _ = launcher.communicate(timeout=TIMEOUT)
        if launcher.returncode or "all start again" not in out:
            yield f"lost: ended with {launcher.returncode}: {out}"
        else:
            yield run_difference(whole, folder)


def checkpoint(bench: Bench) -> Iterator[Outcome]:
    """A file of each corruption a round; reading it must give one sentence."""
    save, path = bench.folder / "run", bench.folder / "corrupt.pth.tar"
    bench.finish(bench.arguments(save, epochs=1))
    whole = (save / NEWEST).read_bytes()
    for _ in range(bench.rounds):
        for corrupt in CORRUPTIONS:
            path.write_bytes(corrupt(bytearray(whole), bench.random))
            try:
                read_checkpoint(path)
                yield f"lost: {corrupt.__name__} was not noticed"
            except UserError as error:
                yield "" if "\n" not in str(error) else f"unclear: {error}"


def disk(bench: Bench) -> Iterator[Outcome]:
    """Runs on a tmpfs that is filled, or whose folder is gone, at a random moment for a while."""
    whole, mounted = bench.folder / "whole", bench.folder / "disk"
    bench.finish(bench.arguments(whole, epochs=8))
    size = 6 * (whole / NEWEST).stat().st_size
    folder = mounted / "run"
    mounted.mkdir()
    for number in range(bench.rounds):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if subprocess.run(mount, capture_output=True).returncode:
            print("disk: mounting is not permitted here, skipped")
            return
        try:
            (run,) = bench.start(bench.arguments(folder, epochs=8))
            wait_until(lambda run=run: (folder / NEWEST).exists() or run.exitcode is not None)
            time.sleep(bench.random.uniform(0, 0.5))
            with (full if number % 2 == 0 else gone)(mounted):
                time.sleep(bench.random.uniform(0.2, 1))
            run.join(TIMEOUT)
            yield run_difference(whole, folder) if run.exitcode == 0 else f"lost: {run.exitcode}"
            kill_all([run])
        finally:
            subprocess.run(["umount", "-l", str(mounted)], check=True)
    warnings = bench.log.read_text().count("warning: cannot write")
    print(f"{warnings} warnings of a checkpoint that could not be written")


@contextlib.contextmanager
def full(mounted: Path) -> Iterator[None]:
    ballast = mounted / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    yield
    ballast.unlink()


@contextlib.contextmanager
def gone(mounted: Path) -> Iterator[None]:
    (mounted / "run").rename(mounted / "elsewhere")
    yield
    (mounted / "elsewhere").rename(mounted / "run")


def image(bench: Bench) -> Iterator[Outcome]:
    """Runs on a damaged image, which they decode or name; those that name it also replace it."""
    exit_codes = Counter()
    for number in range(bench.rounds):
        folder = bench.folder / str(number)
        shutil.copytree(bench.images, folder / "images")
        path = bench.random.choice(sorted(folder.glob("images/train/*/*")))
        corrupt = bench.random.choice((flip_a_bit, flip_many_bits, cut_the_end_off))
        path.write_bytes(corrupt(bytearray(path.read_bytes()), bench.random))
        arguments = bench.arguments(Path("out"), data="images", epochs=1)
        result = run_in_process(train, arguments, folder)
        exit_codes[result.code] += 1
        problem = result.problem() and f"unclear: {result.problem()}"
        if files := leftovers(folder / "out"):
            problem = f"lost: {files[0]} is unfinished"
        elif result.code and str(path) not in result.err:
            problem = f"unclear: {path} is not named: {result.err}"
        elif result.code:
            second = run_in_process(train, [*arguments, "--skip_unreadable", "1"], folder)
            if second.code or f"warning: cannot decode image {path}" not in second.err:
                problem = f"lost: not replaced: {second.err}"
        yield problem
    print(f"{exit_codes[0]} were decoded, {exit_codes[2]} named and then replaced")


FAULTS: dict[str, Callable[[Bench], Iterator[Outcome]]] = {
    f.__name__: f for f in (kill, pair, rank, checkpoint, disk, image)
}


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="of each fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of the above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="a Markdown file that gets the table")
    arguments = parser.parse_args()
    names = arguments.faults.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        raise UserError(f"faults are {', '.join(FAULTS)}, not {unknown[0]}")
    rows = [["fault", "checks", "survived", "lost", "unclear", "seconds"]]
    for name in names:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = list(FAULTS[name](Bench(Path(folder), arguments.rounds, arguments.seed)))
        print("".join(f"{name}: {outcome}\n" for outcome in outcomes if outcome), end="")
        counts = Counter(outcome.partition(":")[0] for outcome in outcomes)
        survived, lost, unclear = counts[""], counts["lost"], counts["unclear"]
        seconds = time.monotonic() - started
        rows.append([name, *map(str, (len(outcomes), survived, lost, unclear)), f"{seconds:.0f}"])
        print(f"{name}: {survived} survived, {lost} lost, {unclear} unclear", flush=True)
    print(markdown_table(rows))
    if arguments.report:
        shell = " ".join(["python tests/fault_injection.py", *sys.argv[1:]])
        machine = f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, torch {torch.__version__}"
        content = f"`{shell}`\n\n{machine}\n\n{markdown_table(rows)}\n"
        atomic_write(arguments.report, lambda file: file.write(content.encode()))
    if any(row[3:5] != ["0", "0"] for row in rows[1:]):
        sys.exit(1)


if __name__ == "__main__":
    main()
