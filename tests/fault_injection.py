"""Real faults on small runs: does the same command go on, and end as if nothing had happened?

    python scripts/fault_injection.py --rounds 100 --faults kill,pair --report FILE.md

kill            SIGKILL at a random moment, while saving too, and the same command again
pair            the same with two processes, both killed
rank            one of two processes under torchrun killed; the launcher goes on by itself
checkpoint      bits flipped, blocks overwritten, ends cut off or added, at random offsets
disk            a small tmpfs full, or the run's folder gone, for a while (needs the right to mount)
image           one training image with bits flipped or its end cut off
configuration   YAML files and command lines made wrong by Hypothesis, given to either step
folder          image folders made wrong by Hypothesis: step 1, check_data and evaluate

A round of the first five is survived if the run ends with the weights, optimizer state, best
checkpoint and records of an unbroken one, and if reading a damaged file gives one sentence.  One of
the others is survived if the program ends well, or with exit code 2, one sentence, which names the
image, and nothing half written; unclear is any other end.  Each fault starts from the seed.
"""

import argparse
import contextlib
import functools
import os
import platform
import random
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from step1.train import main as train_step1
from step2.train import main as train
from tests.apart import FORK, Ended, leftovers, run_apart
from tests.damage import DAMAGE, cut_the_end_off, flip_a_bit, flip_many_bits
from tests.outcomes import Outcome, compared
from utils.checkpoint.checkpoint import NEWEST, PREVIOUS, read_checkpoint
from utils.run.command_line import Parser, command, positive
from utils.run.errors import UserError
from utils.checkpoint.files import atomic_write
from utils.run.command_line import as_table
from utils.data.shapes import draw_set

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("bars", "disc", "star")
IMAGES = {"train": 8, "val": 4}  # of each class
ITERATIONS = 3  # of an epoch
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


class Bench:
    """A folder with images, and the means to start, kill and compare runs."""

    def __init__(self, folder: Path, rounds: int, seed: int):
        self.folder = folder
        self.rounds = rounds
        self.seed = seed
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
            peer = FORK.DistEnv(target=_train, args=(log, arguments, environment))
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
    position, met = (-1, 0), Counter()
    for _ in range(bench.rounds):
        peers = bench.start(log, arguments, processes)
        time.sleep(bench.random.uniform(0, 1.3 * life))
        for peer in peers:
            peer.kill()
        for peer in peers:
            peer.join()
        before = position
        try:
            position = reached(broken)
            yield f"lost: back from {before} to {position}" if position < before else ""
        except UserError as error:
            yield f"lost: {error}"
        met[phase(broken, before, position)] += 1
    told = ", ".join(f"{count} in {name}" for name, count in met.most_common())
    print(f"killed on the way to epoch {position[0]} of {epochs}: {told}", flush=True)
    bench.finish(log, arguments, processes)
    yield compared(whole, broken)


def reached(folder: Path) -> tuple[int, int]:
    """The last epoch finished, and the iterations done of the next, in the newest checkpoint."""
    newest = folder / (NEWEST if (folder / NEWEST).exists() else PREVIOUS)
    if not newest.exists():
        return -1, 0
    content = read_checkpoint(newest).content
    return content["epoch"], content.get("unfinished", {"iteration": 0})["iteration"]


def phase(folder: Path, before: tuple[int, int], position: tuple[int, int]) -> str:
    """What a run was about when it was killed, as far as its folder tells."""
    if any(folder.glob(".*.unfinished-*")):
        return "saving"
    if position == before:
        return "start-up"
    return "validation" if position[1] == ITERATIONS else "training"


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
            except UserError as error:
                yield "" if "\n" not in str(error) else f"unclear: {error}"


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


def image(bench: Bench) -> Iterator[Outcome]:
    """Runs on a damaged image, which they decode or name; those that name it also replace it."""
    ends = Counter()
    for number in range(bench.rounds):
        place = bench.folder / str(number)
        shutil.copytree(bench.images, place / "images")
        path = bench.random.choice(sorted(place.glob("images/train/*/*")))
        damage = bench.random.choice((flip_a_bit, flip_many_bits, cut_the_end_off))
        path.write_bytes(damage(bytearray(path.read_bytes()), bench.random))
        arguments = bench.arguments(Path("out"), data="images", epochs=1)
        ended = run_apart(train, arguments, place)
        ends[ended.code] += 1
        problem = judged(ended, place)
        if not problem and ended.code:
            if str(path) not in ended.err:
                problem = f"unclear: {path} is not named: {ended.err}"
            skipping = run_apart(train, [*arguments, "--skip_unreadable", "1"], place)
            if skipping.code or f"warning: cannot decode image {path}" not in skipping.err:
                problem = f"lost: not replaced: {skipping.err}"
        yield problem
    print(f"{ends[0]} were decoded, {ends[2]} named and then replaced", flush=True)


def configuration(bench: Bench) -> Iterator[Outcome]:
    malformed = malformed_examples()
    ends = Counter()
    base = {**TINY, "epochs": 1, "data": "images", "save": "out"}
    mistakes = malformed.drawn(malformed.mistakes(base), bench.rounds, bench.seed)
    for number, mistake in enumerate(mistakes):
        place = bench.folder / str(number)
        place.mkdir()
        (place / "images").symlink_to(bench.images)
        program = (train_step1, train)[number % 2]
        ended = run_apart(program, mistake.write(place), place)
        ends[ended.code] += 1
        problem = judged(ended, place)
        yield problem and f"{problem}, of {mistake}"
    print(f"{ends[0]} were trained with, {ends[2]} refused", flush=True)


def folder(bench: Bench) -> Iterator[Outcome]:
    malformed = malformed_examples()
    ends = Counter()
    run = bench.folder / "run"
    bench.finish(bench.folder / "log", bench.arguments(run, epochs=1))
    arguments = bench.arguments(Path("out"), data="images", epochs=1)
    programs = {
        train_step1: arguments,
        script("check_data"): ["images", "--workers", "1", "--classes"],
        script("evaluate"): [str(run / NEWEST), "--data", "images", "--workers", "0"],
    }
    wrong_folders = malformed.drawn(malformed.wrong_folders(), bench.rounds, bench.seed)
    for number, wrong in enumerate(wrong_folders):
        place = bench.folder / str(number)
        place.mkdir()
        wrong.write(bench.images, place / "images")
        problem = ""
        for program, arguments in programs.items():
            ended = run_apart(program, arguments, place)
            problem = problem or judged(ended, place)
            ends[program, ended.code] += 1
        yield problem and f"{problem}, of {wrong}"
    print(f"{ends[train_step1, 0]} were trained on, {ends[train_step1, 2]} refused", flush=True)


def script(name: str) -> Callable[[], object]:
    """Another script as a program; scripts do not import one another."""
    path = ROOT / "scripts" / f"{name}.py"
    return functools.partial(runpy.run_path, str(path), run_name="__main__")


def judged(ended: Ended, place: Path) -> Outcome:
    """Of a program that should end well or with one sentence, and leave nothing half written."""
    if complaint := ended.complaint():
        return f"unclear: {complaint}"
    left = leftovers(place / "out")
    return f"lost: {left[0]} is not whole" if left else ""


def malformed_examples() -> ModuleType:
    try:
        from tests import malformed
    except ImportError as error:
        raise UserError(
            f"the faults {' and '.join(NEED_HYPOTHESIS)} need the package {error.name}:"
            " python -m pip install -r requirements-test.txt"
        ) from error
    return malformed


FAULTS: dict[str, Callable[[Bench], Iterator[Outcome]]] = {
    "kill": kill,
    "pair": pair,
    "rank": rank,
    "checkpoint": checkpoint,
    "disk": disk,
    "image": image,
    "configuration": configuration,
    "folder": folder,
}
NEED_HYPOTHESIS = ("configuration", "folder")


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
        raise UserError(f"faults are {', '.join(FAULTS)}, not {unknown[0]}")
    if not set(NEED_HYPOTHESIS).isdisjoint(arguments.faults):
        malformed_examples()
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
        atomic_write(arguments.report, lambda file: file.write(content.encode()))


if __name__ == "__main__":
    main()
