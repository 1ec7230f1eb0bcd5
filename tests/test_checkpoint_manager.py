"""What a run survives: signals, damaged checkpoints, a full disk, numbers that are not finite."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same_checkpoint, assert_same_run, position
from conftest import FROM_SCRATCH, ITERATIONS, ROOT, TINY, config_with

from models import build_model
from utils import engine
from utils.checkpoint import manager
from utils.checkpoint.checkpoint import BEST, NEWEST, PREVIOUS, read_checkpoint
from utils.checkpoint.manager import CheckpointManager
from utils.checkpoint.seal import is_intact
from utils.metrics import BinaryMetrics
from utils.optim import build_optimizer
from utils.run.command_line import PREEMPTED_EXIT_CODE
from utils.run.errors import NonFiniteError, is_out_of_memory
from utils.run.state import TrainState


@contextlib.contextmanager
def at_iteration(number: int, act):
    """Call `act` in the course of iteration `number` of a run, counted from 0 over its epochs."""
    original = CheckpointManager.on_step_end

    def on_step_end(self, state):
        if state.epoch * ITERATIONS + state.iteration - 1 == number:
            act()
        original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointManager, "on_step_end", on_step_end)
        yield


def send(*signals: int):
    return lambda: [os.kill(os.getpid(), number) for number in signals]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Where `whole` is."""
    return tmp_path_factory.mktemp("unbroken") / "out"


@pytest.fixture
def whole(run_step, unbroken) -> Path:
    """The folder of a run of step 2 that nothing happened to."""
    if not unbroken.exists():
        assert run_step(2, save=unbroken, keep_epochs="[0]", **FROM_SCRATCH).code == 0
    return unbroken


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of it, where the same command goes on."""
    return shutil.copytree(whole, tmp_path / "step2")


@pytest.mark.parametrize(
    ("iteration", "number"),
    [(0, signal.SIGTERM), (2, signal.SIGUSR1), (4, signal.SIGINT)],
    ids=["first", "last of the epoch", "second epoch"],
)
def test_a_signal_ends_the_iteration_saves_and_leaves_and_the_same_command_goes_on(
    run_step, tmp_path, whole, iteration, number
):
    with at_iteration(iteration, send(number)):
        stopped = run_step(2, **FROM_SCRATCH)
    assert stopped.code == PREEMPTED_EXIT_CODE, stopped.err
    folder = tmp_path / "step2"
    epoch, done = divmod(iteration, ITERATIONS)
    assert position(folder / NEWEST) == (epoch - 1, done + 1)
    torch.manual_seed(99)
    again = run_step(2, **FROM_SCRATCH)
    assert f"{done + 1} iterations of this run, which goes on" in again.out
    assert_same_run(whole, folder)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_with_deterministic_algorithms_a_run_goes_on_bit_for_bit_on_a_gpu_too(
    run_step, tmp_path, device, precision
):
    options = {"device": device, "precision": precision, **FROM_SCRATCH}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # A warning is enough: the counts of histograms have no deterministic algorithm and need none.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert run_step(2, save=whole, **options).code == 0
        with at_iteration(4, send(signal.SIGTERM)):
            assert run_step(2, save=broken, **options).code == PREEMPTED_EXIT_CODE
        torch.manual_seed(99)
        assert run_step(2, save=broken, **options).code == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(whole, broken)


def test_a_signal_to_every_process_leaves_the_loading_workers_to_finish_the_iteration(
    run_step, tmp_path, whole
):
    def send_to_all():
        for child in multiprocessing.active_children():
            subprocess.run(["kill", str(child.pid)], check=True)
        send(signal.SIGTERM)()

    too_late = at_iteration(1, lambda: pytest.fail("it should have left"))
    with at_iteration(0, send_to_all), too_late:
        assert run_step(2, workers=1, **FROM_SCRATCH).code == PREEMPTED_EXIT_CODE
    assert run_step(2, workers=1, **FROM_SCRATCH).code == 0
    assert_same_run(whole, tmp_path / "step2")


def test_a_signal_during_validation_is_answered_after_the_next_iteration(
    run_step, tmp_path, whole, monkeypatch
):
    def evaluate(*arguments):
        send(signal.SIGTERM)()
        return engine.evaluate(*arguments)

    monkeypatch.setattr("step2.train.evaluate", evaluate)
    assert run_step(2, **FROM_SCRATCH).code == PREEMPTED_EXIT_CODE
    assert position(tmp_path / "step2" / NEWEST) == (0, 1)
    assert run_step(2, **FROM_SCRATCH).code == 0
    assert_same_run(whole, tmp_path / "step2")


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_interrupted_without_saving_repeats_the_epoch_with_the_same_bits(
    run_step, tmp_path, step
):
    run_step(1, save=tmp_path / "teacher", binary_activations="false")
    teacher = tmp_path / "teacher" / BEST if step == 2 else "none"
    options = {"epochs": 4, "learning_rate": 1e-2, "init_from": "none", "teacher": teacher}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_step(step, save=whole, **options).code == 0

    def interrupt():
        raise KeyboardInterrupt

    with at_iteration(2 * ITERATIONS + 1, interrupt):
        assert run_step(step, save=broken, **options).code == "interrupted"
    torch.manual_seed(99)
    again = run_step(step, save=broken, **options)
    assert "weights start from epoch 1 of this run" in again.out
    assert_same_run(whole, broken)


def test_a_second_interrupt_leaves_at_once_with_the_last_checkpoint_intact(run_step, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with it ignored
    with at_iteration(4, send(signal.SIGINT, signal.SIGINT)):
        assert run_step(2, **FROM_SCRATCH).code == "interrupted"
    assert position(tmp_path / "step2" / NEWEST) == (0, 0)
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_within_an_epoch_come_by_the_clock_and_on_demand(
    run_step, tmp_path, monkeypatch
):
    written = []  # epochs
    original = manager.write_checkpoint

    def write_checkpoint(path, content, *rest):
        if path.name == NEWEST:
            written.append(content["epoch"])
        original(path, content, *rest)

    monkeypatch.setattr(manager, "write_checkpoint", write_checkpoint)
    with at_iteration(1, send(signal.SIGUSR2)):
        assert run_step(2, save=tmp_path / "demand", **FROM_SCRATCH).code == 0
    assert written == [-1, 0, 1]
    written.clear()
    assert run_step(2, save=tmp_path / "clock", checkpoint_minutes=0, **FROM_SCRATCH).code == 0
    assert written == [-1, -1, -1, 0, 0, 0, 0, 1]
    written.clear()
    clock = count(step=20)  # seconds from one look at it to the next
    monkeypatch.setattr(manager, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    minute = {"save": tmp_path / "minute", "checkpoint_minutes": 1}
    assert run_step(2, **minute, **FROM_SCRATCH).code == 0
    assert written == [-1, 0, 0, 1]  # the third iteration comes 60 s after the save before it


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_previous_one(
    run_step, whole, finished, damage
):
    newest = finished / NEWEST
    data = newest.read_bytes()
    damaged = {"cut": data[: len(data) // 2], "flipped": data[:9999] + b"?" + data[10000:]}
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(damaged[damage])
    again = run_step(2, **FROM_SCRATCH)
    assert again.code == 0, again.err
    assert "weights start from epoch 0 of this run" in again.out
    assert ("warning: " + str(newest) in again.out) == (damage != "missing")
    for name in (NEWEST, PREVIOUS):
        assert_same_checkpoint(whole / name, finished / name)


def test_damage_to_both_checkpoints_stops_a_continuation_and_changes_neither(run_step, finished):
    files = [finished / name for name in (NEWEST, PREVIOUS)]
    for path in files:
        path.write_bytes(path.read_bytes()[:5000])
    run_step(2, **FROM_SCRATCH).assert_one_sentence(str(files[0]), "damaged or truncated")
    assert [path.stat().st_size for path in files] == [5000, 5000]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_other_settings_do_not_overwrite_a_run(run_step, finished):
    before = contents(finished)
    result = run_step(2, **{**FROM_SCRATCH, "learning_rate": 0.5})
    result.assert_one_sentence("learning_rate 0.5 (there 0.01)", "--save")
    assert contents(finished) == before


def test_a_run_with_more_epochs_is_refused_and_the_way_that_is_named_trains_on(
    run_step, finished, tmp_path
):
    newest = finished / NEWEST
    refused = run_step(2, **{**FROM_SCRATCH, "epochs": 3})
    refused.assert_one_sentence("epochs 3 (there 2)", f"--init_from {newest} with another --save")
    result = run_step(2, **{**FROM_SCRATCH, "epochs": 3, "init_from": newest}, save=tmp_path / "x")
    assert result.code == 0 and f"weights start from {newest}" in result.out


def test_a_finished_run_started_again_changes_no_checkpoint(run_step, finished):
    before = (finished / NEWEST).read_bytes()
    again = run_step(2, **FROM_SCRATCH)
    assert again.code == 0 and "finished: best val top-1" in again.out
    assert (finished / NEWEST).read_bytes() == before


def test_a_foreign_checkpoint_in_the_folder_is_not_continued(run_step, finished):
    path = finished / NEWEST
    torch.save({"state_dict": read_checkpoint(path).state, "epoch": 1}, path)
    run_step(2, **FROM_SCRATCH).assert_one_sentence("cannot be continued")


@pytest.mark.parametrize("name", [NEWEST, "epoch_0.pth.tar"])
def test_a_disk_that_is_full_for_a_while_costs_a_warning_and_no_checkpoint(
    run_step, tmp_path, whole, monkeypatch, name
):
    original = manager.write_checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    attempts = []

    def write_checkpoint(path, *rest):
        """The first time that it writes `name` it meets a limit of the file system, a real one."""
        attempts.append(path.name)
        if path.name == name and attempts.count(name) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            original(path, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(manager, "write_checkpoint", write_checkpoint)
    result = run_step(2, checkpoint_minutes=0, keep_epochs="[0]", **FROM_SCRATCH)
    assert result.code == 0, result.err
    (warning,) = [line for line in result.out.splitlines() if "warning: " in line]
    assert warning.startswith(f"warning: cannot write {tmp_path}/step2/{name}: ")
    assert warning.endswith("training goes on, the next checkpoint tries again")
    assert_same_run(whole, tmp_path / "step2")
    assert_same_checkpoint(whole / "epoch_0.pth.tar", tmp_path / "step2" / "epoch_0.pth.tar")
    assert is_intact(tmp_path / "step2" / PREVIOUS)


@pytest.mark.parametrize("asked_to_leave", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(run_step, tmp_path, asked_to_leave):
    folder = tmp_path / "step1"

    def in_the_way():
        (folder / NEWEST).mkdir()
        (folder / NEWEST / "file").touch()
        if asked_to_leave:
            send(signal.SIGTERM)()

    with at_iteration(0, in_the_way):
        result = run_step(1, epochs=1)
    assert result.code == 2 and f"error: cannot write {folder / NEWEST}" in result.err
    assert ("stopped on request" if asked_to_leave else "finished") in result.out


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_not_finite_stops_before_weights_and_checkpoint_and_names_the_images(
    run_step, tmp_path, monkeypatch, ahead
):
    monkeypatch.setattr(engine, "runs_ahead", lambda device, optimizer: ahead)
    result = run_step(1, learning_rate=1e30, checkpoint_minutes=0, epochs=3)
    result.assert_one_sentence("at epoch 0, iteration 1, images ", "learning_rate")
    named = result.err.split("images ")[1].split(";")[0].split(", ")
    assert len({int(index) for index in named}) == TINY["batch_size"]
    newest = tmp_path / "step1" / NEWEST
    assert position(newest) == (-1, 1)
    assert all(value.isfinite().all() for value in read_checkpoint(newest).state.values())


class Batches(list):
    def image_indices(self, batch: int) -> list[int]:
        return [batch, batch + 10]


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_loss_and_a_gradient_are_both_looked_at(name):
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, float("nan") if name == "gradient" else 0.0]])
    loss = torch.tensor(float("inf") if name == "loss" else 1.0)
    guard = engine.FiniteGuard(model, None, Batches(), TrainState(iteration=7))
    with pytest.raises(NonFiniteError, match=f"the {name}.* is (inf|nan) .* images 7, 17;"):
        guard.check(loss)
    model.weight.grad = torch.full((1, 2), 1e18)
    guard.check(torch.tensor(1.0))


class Recorder:
    def __init__(self, look):
        self.look, self.seen = look, []

    def on_step_end(self, state):
        self.seen.append(self.look())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("at", [0, 2])
def test_where_the_device_is_not_waited_for_an_update_that_is_not_finite_changes_no_weight(
    monkeypatch, at, optimizer, accumulate
):
    monkeypatch.setattr(engine, "runs_ahead", lambda device, optimizer: True)
    batches = Batches((torch.ones(4, 3), torch.zeros(4, dtype=torch.long)) for _ in range(3))
    batches[at][0][-1] = float("nan")
    model = torch.nn.Linear(3, 2)
    options = {"optimizer": optimizer, "optimizer_options": {"fused": True}}
    config = config_with(accumulate=accumulate, **options)
    recorder = Recorder(model.weight.detach().clone)
    before, state = recorder.look(), TrainState(hooks=[recorder])
    with pytest.raises(NonFiniteError, match=f"iteration {at}, images {at}, {at + 10};"):
        engine.train_one_epoch(model, None, batches, build_optimizer(model, config), config, state)
    weights = [before, *recorder.seen]
    changed = [not torch.equal(old, new) for old, new in pairwise(weights)]
    assert changed == {0: [False], 2: [True, True, False]}[at]  # the error came right after


def test_no_iteration_asks_the_device_for_a_value(monkeypatch):
    asked = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, method=method: asked.append(x.shape) or method(x)
        )
    monkeypatch.setattr(engine, "runs_ahead", lambda device, optimizer: True)
    monkeypatch.setattr(engine.FiniteGuard, "settle", lambda guard: None)
    model = build_model("reactnet_a", 3, width=1 / 16, small_images=True)
    images, labels = torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    recorder, config = Recorder(asked.copy), config_with()
    state = TrainState(hooks=[BinaryMetrics(model, images), recorder])
    optimizer = build_optimizer(model, config)
    engine.train_one_epoch(model, None, [(images, labels)] * 3, optimizer, config, state)
    assert recorder.seen == [[], [], []] and asked


@pytest.mark.parametrize(
    "function",
    [
        "step1.train.build_model",
        "step1.train.place",
        "step1.train.build_metrics",
        "step1.train.distribute",
        "utils.engine.batch_loss",
    ],
)
def test_too_little_memory_is_one_sentence_with_the_sizes(run_step, monkeypatch, function):
    def allocate(*_, **__):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(function, allocate)
    sizes = ("out of memory with batch_size 8", "width 0.03125", "choose a smaller one")
    run_step(1).assert_one_sentence(*sizes)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_too_little_memory_is_known_by_type_or_words_also_within_a_compilers_error(error, expected):
    wrapped = ValueError("the compiler failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(error) is is_out_of_memory(wrapped) is expected


def test_a_batch_of_one_image_that_bn_cannot_normalise_is_one_sentence(run_step):
    sizes = {"image_size": 8, "val_resize": 8, "batch_size": 1}
    run_step(1, **sizes).assert_one_sentence("one image of image_size 8", "batch_size (here 1)")


def test_a_few_rounds_of_injected_faults_are_survived(tmp_path):
    report = tmp_path / "report.md"
    program = [sys.executable, str(ROOT / "tests" / "fault_injection.py")]
    options = ["--rounds", "2", "--faults", "kill,checkpoint", "--report", str(report)]
    run = subprocess.run([*program, *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "kill: 3 survived, 0 lost" in run.stdout
    assert "checkpoint: 10 survived, 0 lost" in run.stdout
    assert "| checkpoint |     10 |" in report.read_text()
