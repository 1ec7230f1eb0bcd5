"""Real faults on small runs: does the same command go on, and end as if nothing had happened?

    python scripts/fault_injection.py --rounds 100 --faults kill,pair --report FILE.md

kill            SIGKILL at a random moment, while saving too, and the same command again
pair            the same with two processes, both killed
rank            one of two processes under torchrun killed; the launcher goes on by itself
checkpoint      bits flipped, blocks overwritten, ends cut off or added, at random offsets
disk            a small tmpfs full, or the run's folder gone, for a while (needs the right to mount)

A round is survived if the run ends with the weights, optimizer state, best checkpoint and records
of an unbroken one; a damaged file, if reading it gives one sentence.  Each fault starts from the
seed.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from step2.train import main as train
from utils.checkpoint import BEST, NEWEST, PREVIOUS, read_checkpoint
from utils.command_line import Parser, command, positive
from utils.errors import InputError
from utils.files import write_whole
from utils.markdown import as_table
from utils.records import RECORDS, read_records
from utils.shapes import draw_set

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("bars", "disc", "star")
IMAGES = {"train": 8, "val": 4}  # of each class
# A checkpoint after each iteration, three an epoch, so that kills meet the saving of many.
TINY = {
    "image_size": 16,
    "val_resize": 16,
    "small_images": "true",
    "width": 1 / 32,
    "batch_size": 8,
    "workers": 0,
    "teacher": "none",
    "init_from": "none",
    "latent_init": "symmetric",
    "learning_rate": 0.01,
    "checkpoint_minutes": 0,
}
LONGEST = 600.0  # seconds that any run may take
FORK = multiprocessing.get_context("fork")  # torch is loaded once, by this process

Outcome = str  # empty when survived, else what was lost or unclear


class Bench:
    """A folder with images, and the means to start, kill and compare runs."""

    def __init__(self, folder: Path, rounds: int, seed: int):
        self.folder = folder
        self.rounds = rounds
        self.random = random.Random(seed)
        self.images = folder / "images"
        draw_set(self.images, CLASSES, IMAGES, "{}.jpg")

    def arguments(self, save: Path, **options: Any) -> list[str]:
        values = {"data": self.images, "save": save, **TINY, **options}
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    def start(self, log: Path, arguments: list[str], processes: int = 1) -> list:
        """Start step 2 as `processes` peers that write to `log`."""
        port = free_port()
        peers = []
        for rank in range(processes):
            joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {k: str(v) for k, v in {**joined, **address}.items()}
            peer = FORK.Process(target=_train, args=(log, arguments, environment))
            peer.start()
            peers.append(peer)
        return peers

    def finish(self, log: Path, arguments: list[str], processes: int = 1) -> int:
        """Run to the end; the exit code of the first process."""
        peers = self.start(log, arguments, processes)
        for peer in peers:
            peer.join(LONGEST)
            peer.kill()
            peer.join()
        return peers[0].exitcode


def _train(log: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *arguments]
    torch.set_num_threads(1)
    train()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


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
    """All that a run leaves and computes, speed and place apart."""
    found = {}
    for name in (NEWEST, BEST):
        content = dict(read_checkpoint(folder / name).content)
        del content["config"]
        content["history"] = [without_speed(record) for record in content["history"]]
        found[name] = content
    found[RECORDS] = [without_speed(record) for record in read_records(folder)]
    return found


def compared(whole: Path, folder: Path) -> Outcome:
    try:
        differs = difference(outcome(whole), outcome(folder))
    except (InputError, OSError, ValueError) as error:
        return f"lost: {error}"
    return differs and f"lost: {differs} differs from the unbroken run"


def kill(bench: Bench, processes: int = 1) -> Iterator[Outcome]:
    """One run, killed `rounds` times and then left alone."""
    whole, broken = bench.folder / "whole", bench.folder / "broken"
    log = bench.folder / "log"
    epochs = max(bench.rounds, 3)
    started = time.monotonic()
    if bench.finish(log, bench.arguments(whole, epochs=1), processes):
        yield f"lost: the unbroken run failed: {log}"
        return
    life = time.monotonic() - started
    shutil.rmtree(whole)
    bench.finish(log, bench.arguments(whole, epochs=epochs), processes)
    arguments = bench.arguments(broken, epochs=epochs)
    reached = []
    for _ in range(bench.rounds):
        peers = bench.start(log, arguments, processes)
        time.sleep(bench.random.uniform(0, 1.3 * life))
        for peer in peers:
            peer.kill()
        for peer in peers:
            peer.join()
        newest = broken / (NEWEST if (broken / NEWEST).exists() else PREVIOUS)
        try:
            reached.append(read_checkpoint(newest).epoch if newest.exists() else -1)
            problem = ""
        except InputError as error:
            problem = f"lost: {error}"
        if reached[-2:] != sorted(reached[-2:]):
            problem = f"lost: back from epoch {reached[-2]} to {reached[-1]}"
        yield problem
    print(f"killed {bench.rounds} times on the way to epoch {reached[-1]} of {epochs}", flush=True)
    bench.finish(log, arguments, processes)
    yield compared(whole, broken)


def pair(bench: Bench) -> Iterator[Outcome]:
    return kill(bench, processes=2)


def rank(bench: Bench) -> Iterator[Outcome]:
    """Runs under torchrun, in each of which one process is killed."""
    whole = bench.folder / "whole"
    bench.finish(bench.folder / "log", bench.arguments(whole, epochs=6), processes=2)
    for number in range(bench.rounds):
        folder, log = bench.folder / f"run{number}", bench.folder / f"log{number}"
        launch = [sys.executable, str(ROOT / "utils" / "launch.py"), str(ROOT / "step2/train.py")]
        environment = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            run = subprocess.Popen(
                [*launch, *bench.arguments(folder, epochs=6)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        with run:
            wait_until(lambda folder=folder: (folder / NEWEST).exists())
            time.sleep(bench.random.uniform(0, 1))
            peers = children(run.pid)
            if peers:
                bench.random.choice(peers)()
            code = run.wait(LONGEST)
        restarted = "all start again" in log.read_text()
        if code or not restarted:
            yield f"lost: ended with {code}, restarted: {restarted}"
        else:
            yield compared(whole, folder)


def children(parent: int) -> list[Callable[[], None]]:
    """How to kill each child of a process."""
    listing = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [lambda pid=int(pid): os.kill(pid, 9) for pid in listing]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)


def checkpoint(bench: Bench) -> Iterator[Outcome]:
    """Five damaged files a round; reading each must give one sentence."""
    save = bench.folder / "run"
    bench.finish(bench.folder / "log", bench.arguments(save, epochs=1))
    whole = (save / NEWEST).read_bytes()
    path = bench.folder / "damaged.pth.tar"
    for _ in range(bench.rounds):
        for damage in DAMAGE:
            path.write_bytes(damage(bytearray(whole), bench.random))
            try:
                read_checkpoint(path)
                yield f"lost: {damage.__name__} was not noticed"
            except InputError as error:
                yield "" if "\n" not in str(error) else f"unclear: {error}"


def flip_a_bit(data: bytearray, chance: random.Random) -> bytes:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def flip_many_bits(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.randint(2, 1000)):
        flip_a_bit(data, chance)
    return data


def overwrite_a_block(data: bytearray, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(data) - 4096), chance.randint(64, 4096)
    data[start : start + length] = chance.randbytes(length)
    return data


def cut_the_end_off(data: bytearray, chance: random.Random) -> bytes:
    near_the_end = chance.random() < 0.5
    return data[: chance.randrange(len(data) - 200 if near_the_end else 0, len(data))]


def add_to_the_end(data: bytearray, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randint(1, 5000))


DAMAGE = (flip_a_bit, flip_many_bits, overwrite_a_block, cut_the_end_off, add_to_the_end)


def disk(bench: Bench) -> Iterator[Outcome]:
    """Runs on a tmpfs that is filled, or whose folder is gone, at a random moment for a while."""
    whole = bench.folder / "whole"
    bench.finish(bench.folder / "log", bench.arguments(whole, epochs=8))
    size = 6 * (whole / NEWEST).stat().st_size
    mounted = bench.folder / "disk"
    mounted.mkdir()
    warned = 0
    for number in range(bench.rounds):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if subprocess.run(mount, capture_output=True).returncode:
            print("disk: mounting is not permitted here, skipped", flush=True)
            return
        try:
            log, folder = bench.folder / f"log{number}", mounted / "run"
            (run,) = bench.start(log, bench.arguments(folder, epochs=8))
            wait_until(lambda folder=folder, run=run: (folder / NEWEST).exists() or run.exitcode)
            time.sleep(bench.random.uniform(0, 0.5))
            fault = full if number % 2 == 0 else gone
            with fault(mounted):
                time.sleep(bench.random.uniform(0.2, 1))
            run.join(LONGEST)
            run.kill()
            warned += "warning: cannot write" in log.read_text()
            yield compared(whole, folder) if run.exitcode == 0 else f"lost: {run.exitcode}, {log}"
        finally:
            subprocess.run(["umount", "-l", str(mounted)], check=True)
    print(
        f"{warned} of {bench.rounds} runs warned of a checkpoint they could not write", flush=True
    )


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


FAULTS: dict[str, Callable[[Bench], Iterator[Outcome]]] = {
    "kill": kill,
    "pair": pair,
    "rank": rank,
    "checkpoint": checkpoint,
    "disk": disk,
}


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="of each fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of the above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="a Markdown file that gets the table")
    arguments = parser.parse_args()
    arguments.faults = arguments.faults.split(",")
    unknown = [name for name in arguments.faults if name not in FAULTS]
    if unknown:
        raise InputError(f"faults are {', '.join(FAULTS)}, not {unknown[0]}")
    return arguments


@command
def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.faults:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            bench = Bench(Path(folder), arguments.rounds, arguments.seed)
            problems = []
            for problem in FAULTS[name](bench):
                problems.append(problem)
                if problem:
                    print(f"{name}: {problem}", flush=True)
        lost, unclear = (
            sum(problem.startswith(word) for problem in problems) for word in ("lost", "unclear")
        )
        survived = len(problems) - lost - unclear
        seconds = time.monotonic() - started
        rows.append([name, len(problems), survived, lost, unclear, f"{seconds:.0f}"])
        print(f"{name}: {survived} survived, {lost} lost, {unclear} unclear", flush=True)
    report(rows, arguments)
    if any(row[3] or row[4] for row in rows):
        sys.exit(1)


def report(rows: list[list], arguments: argparse.Namespace) -> None:
    header = ["fault", "checks", "survived", "lost", "unclear", "seconds"]
    text = as_table([header, *([str(cell) for cell in row] for row in rows)])
    print(text)
    if arguments.report:
        told = " ".join(["python scripts/fault_injection.py", *sys.argv[1:]])
        place = f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()})"
        content = f"`{told}`\n\n{place}, torch {torch.__version__}\n\n{text}\n"
        write_whole(arguments.report, lambda file: file.write(content.encode()))


if __name__ == "__main__":
    main()
