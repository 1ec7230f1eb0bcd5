"""What a run survives: signals, kills, damaged files, a full disk, numbers that are not finite."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from test_training import assert_same_run, read

from utils import engine, keeping
from utils.checkpoint.checkpoint import BEST, NEWEST, PREVIOUS, read_checkpoint, write_checkpoint
from utils.run.errors import UserError
from utils.checkpoint.files import LOCK
from utils.checkpoint.manager import CheckpointManager
from utils.limits import is_out_of_memory
from utils.sealing import is_intact

ITERATIONS = 3  # of an epoch
STOPPED = 75
OPTIONS = {"init_from": "none", "latent_init": "symmetric", "learning_rate": 0.01}


def at_iteration(patch: pytest.MonkeyPatch, number: int, act) -> None:
    """Call `act` in the course of iteration `number` of a run, counted from 0 over its epochs."""
    original = CheckpointManager.after_step

    def after_step(self):
        if len(self.history) * ITERATIONS + self.iteration == number:
            act()
        original(self)

    patch.setattr(CheckpointManager, "after_step", after_step)


def send(*signals: int):
    return lambda: [os.kill(os.getpid(), number) for number in signals]


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Where the tests below keep the run that nothing happened to."""
    return tmp_path_factory.mktemp("unbroken") / "out"


@pytest.fixture
def whole(run_step, unbroken) -> Path:
    if not unbroken.exists():
        assert run_step(2, save=unbroken, **OPTIONS).code == 0
    return unbroken


def assert_ends_as(whole: Path, folder: Path) -> None:
    for name in (NEWEST, BEST):
        assert_same_run(whole / name, folder / name)
    assert records(whole) == records(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("iteration", "number"),
    [(0, signal.SIGTERM), (2, signal.SIGUSR1), (4, signal.SIGINT)],
    ids=["first", "last of the epoch", "second epoch"],
)
def test_a_signal_ends_the_iteration_saves_and_leaves_and_the_same_command_goes_on(
    run_step, tmp_path, whole, iteration, number
):
    with pytest.MonkeyPatch.context() as patch:
        at_iteration(patch, iteration, send(number))
        stopped = run_step(2, **OPTIONS)
    assert stopped.code == STOPPED, stopped.err
    folder = tmp_path / "step2"
    epoch, done = divmod(iteration, ITERATIONS)
    content = read(folder / NEWEST)
    assert (content["epoch"], content["unfinished"]["iteration"]) == (epoch - 1, done + 1)
    torch.manual_seed(99)
    again = run_step(2, **OPTIONS)
    assert f"{done + 1} iterations of this run, which goes on" in again.out
    assert_ends_as(whole, folder)


def test_a_signal_to_every_process_leaves_the_loading_workers_to_finish_the_iteration(
    run_step, tmp_path, whole
):
    def send_to_all():
        for child in multiprocessing.active_children():
            subprocess.run(["kill", str(child.pid)], check=True)
        send(signal.SIGTERM)()

    with pytest.MonkeyPatch.context() as patch:
        at_iteration(patch, 0, send_to_all)
        at_iteration(patch, 1, lambda: pytest.fail("it should have left"))
        assert run_step(2, workers=1, **OPTIONS).code == STOPPED
    assert run_step(2, workers=1, **OPTIONS).code == 0
    assert_ends_as(whole, tmp_path / "step2")


def test_a_signal_during_validation_is_answered_after_the_next_iteration(
    run_step, tmp_path, whole, monkeypatch
):
    original = engine.validate

    def validate(*arguments):
        send(signal.SIGTERM)()
        return original(*arguments)

    monkeypatch.setattr(engine, "validate", validate)
    assert run_step(2, **OPTIONS).code == STOPPED
    content = read(tmp_path / "step2" / NEWEST)
    assert (content["epoch"], content["unfinished"]["iteration"]) == (0, 1)
    assert run_step(2, **OPTIONS).code == 0
    assert_ends_as(whole, tmp_path / "step2")


def test_a_second_interrupt_leaves_at_once_with_the_last_checkpoint_intact(run_step, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with it ignored
    with pytest.MonkeyPatch.context() as patch:
        at_iteration(patch, 4, send(signal.SIGINT, signal.SIGINT))
        assert run_step(2, **OPTIONS).code == "interrupted"
    content = read_checkpoint(tmp_path / "step2" / NEWEST).content
    assert content["epoch"] == 0 and "unfinished" not in content
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_within_an_epoch_come_by_the_clock_and_on_demand(run_step, tmp_path):
    written = []
    original = keeping.write_newest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            keeping, "write_newest", lambda *a: written.append(a[1]["epoch"]) or original(*a)
        )
        at_iteration(patch, 1, send(signal.SIGUSR2))
        assert run_step(2, save=tmp_path / "demand", **OPTIONS).code == 0
        assert written == [-1, 0, 1]
        written.clear()
        assert run_step(2, save=tmp_path / "clock", checkpoint_minutes=0, **OPTIONS).code == 0
        assert written == [-1, -1, -1, 0, 0, 0, 0, 1]


def test_a_checkpoint_within_an_epoch_is_told_and_evaluated(run_step, run_script, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_iteration(patch, 1, send(signal.SIGTERM))
        run_step(2, **OPTIONS)
    shown = run_script("inspect_checkpoint", tmp_path / "step2" / NEWEST)
    assert shown.code == 0 and "within the first epoch" in shown.out


def test_a_second_run_on_a_folder_is_refused_until_the_first_is_dead(run_step, tmp_path):
    folder = tmp_path / "step1"
    hold = (
        "import sys; from pathlib import Path; from utils.checkpoint.files import lock_directory\n"
        f"with lock_directory(Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        leftover = folder / f".{NEWEST}.unfinished-{holder.pid}"
        leftover.write_bytes(b"half a checkpoint")
        run_step(1).assert_one_sentence(f"{folder} is in use by another run", "--save")
        assert {path.name for path in folder.iterdir()} == {LOCK, leftover.name}
        holder.kill()
        holder.wait()
    assert run_step(1, epochs=1).code == 0
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_no_flipped_byte_and_no_cut_of_a_checkpoint_goes_unseen(tmp_path):
    path = tmp_path / "file"
    write_checkpoint(path, {"state_dict": {"weight": torch.arange(500.0)}, "epoch": 1})
    whole = path.read_bytes()
    assert is_intact(path) and read_checkpoint(path).epoch == 1
    chosen = random.Random(0)
    ends = range(len(whole) - 110, len(whole))  # the archive's end record and the seal
    for offset in [*range(0, 8), *chosen.sample(range(len(whole)), 150), *ends]:
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << chosen.randrange(8)
        for damaged in (flipped, whole[:offset]):
            path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                read_checkpoint(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_others_wrote_without_a_seal_still_loads(tmp_path):
    path = tmp_path / "file"
    for zipped in (True, False):
        content = {"state_dict": {"weight": torch.zeros(3)}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert read_checkpoint(path).state["weight"].tolist() == [0, 0, 0]


def test_a_disk_that_is_full_for_a_while_costs_a_warning_and_no_checkpoint(
    run_step, tmp_path, whole
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "write_checkpoint", limited(keeping.write_checkpoint, limits))
        again = run_step(2, checkpoint_minutes=0, **OPTIONS)
    assert again.code == 0, again.err
    assert again.out.count(f"warning: cannot write {tmp_path}/step2/{BEST}: ") == 1
    assert "training goes on" in again.out
    assert_ends_as(whole, tmp_path / "step2")
    assert is_intact(tmp_path / "step2" / PREVIOUS)


def limited(write, limits):
    """`write` that the first time meets a limit of the file system, a real one."""
    calls = []

    def limited_write(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited_write


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(run_step, tmp_path):
    folder = tmp_path / "step1"

    def in_the_way():
        (folder / NEWEST).mkdir()
        (folder / NEWEST / "file").touch()

    with pytest.MonkeyPatch.context() as patch:
        at_iteration(patch, 0, in_the_way)
        result = run_step(1, epochs=1)
    assert result.code == 2 and f"error: cannot write {folder / NEWEST}" in result.err
    assert "finished" in result.out


def test_what_is_not_finite_stops_before_the_weights_and_names_the_images(run_step, tmp_path):
    result = run_step(1, learning_rate=1e30, checkpoint_minutes=0, epochs=3)
    result.assert_one_sentence("at epoch 0, iteration 1, images ", "learning_rate")
    named = result.err.split("images ")[1].split(";")[0].split(", ")
    assert len({int(index) for index in named}) == TINY["batch_size"]
    newest = read(tmp_path / "step1" / NEWEST)
    assert newest["unfinished"]["iteration"] == 1
    assert all(value.isfinite().all() for value in newest["state_dict"].values())


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_loss_and_a_gradient_are_both_looked_at(name):
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, float("nan") if name == "gradient" else 0.0]])
    loss = torch.tensor(float("inf") if name == "loss" else 1.0)
    with pytest.raises(engine.NonFiniteError, match=f"the {name}.* is (inf|nan)"):
        engine.check_finite(loss, model)
    model.weight.grad = torch.full((1, 2), 1e18)
    engine.check_finite(torch.tensor(1.0), model)


def test_too_little_memory_names_the_batch_size(run_step, monkeypatch):
    def allocate(*_):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(engine, "batch_loss", allocate)
    run_step(1).assert_one_sentence("out of memory with batch_size 8", "choose a smaller one")


@pytest.mark.parametrize("place", ["build_model", "place", "live_measures", "distribute"])
def test_too_little_memory_before_the_first_step_is_told_alike(run_step, monkeypatch, place):
    def allocate(*_, **__):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(f"step1.train.{place}", allocate)
    run_step(1).assert_one_sentence("out of memory with batch_size 8", "width 0.03125")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_too_little_memory_is_known_by_type_or_words_also_within_a_compilers_error(error, found):
    wrapped = ValueError("the compiler failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(error) is is_out_of_memory(wrapped) is found


def test_a_batch_of_one_image_that_bn_cannot_normalise_is_told(run_step):
    sizes = {"image_size": 8, "val_resize": 8, "batch_size": 1}
    run_step(1, **sizes).assert_one_sentence("one image of image_size 8", "batch_size (here 1)")


def test_a_few_rounds_of_injected_faults_are_survived(tmp_path):
    report = tmp_path / "report.md"
    program = [sys.executable, str(ROOT / "scripts" / "fault_injection.py")]
    options = ["--rounds", "2", "--faults", "kill,checkpoint", "--report", str(report)]
    run = subprocess.run([*program, *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "kill: 3 survived, 0 lost" in run.stdout
    assert "checkpoint: 10 survived, 0 lost" in run.stdout
    assert "| checkpoint |     10 |" in report.read_text()
