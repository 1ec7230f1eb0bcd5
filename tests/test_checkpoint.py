"""Checkpoint files: written whole or not at all, intact or refused, data only, loaded strictly."""

import hashlib
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import difference
from conftest import ROOT

from models import build_model
from utils.checkpoint.checkpoint import (
    NEWEST,
    Checkpoint,
    load_strictly,
    read_checkpoint,
    write_checkpoint,
)
from utils.checkpoint.files import LOCK, UNFINISHED, atomic_write
from utils.checkpoint.seal import is_intact
from utils.run.errors import UserError


def tiny(**options):
    return build_model("reactnet_a", num_classes=3, width=1 / 32, small_images=True, **options)


def save(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(b"old")

    def fill_the_disk(file):
        file.write(b"half of the ne")
        assert list(tmp_path.glob(f".*{UNFINISHED}"))  # what a run that goes on removes
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        atomic_write(path, fill_the_disk)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_and_never_rewritten_in_place(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        atomic_write(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


class Hostile:
    """A pickle that would create a file on loading."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    ran = tmp_path / "ran"
    content = {"state_dict": {"fc.weight": torch.zeros(1)}, "epoch": Hostile(ran)}
    path = tmp_path / "hostile.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="read as data only"):
        read_checkpoint(path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Hostile(ran)))
    assert ran.exists(), "the pickle would have run"


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"epoch": 3, "state_dict": {}},
        {"a": 1},
        {"state_dict": {"a": 1}},
        {1: torch.zeros(1)},
        {},
    ],
)
def test_data_without_a_state_dict_is_no_checkpoint(tmp_path, content):
    with pytest.raises(UserError, match="is not a checkpoint"):
        read_checkpoint(save(tmp_path / "file", content))


def test_text_a_folder_and_a_missing_file_are_no_checkpoints(tmp_path):
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    for path, words in (
        (tmp_path / "text", "is not a checkpoint"),
        (tmp_path, "cannot read checkpoint"),
        (tmp_path / "missing", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            read_checkpoint(path)


def test_a_loaded_checkpoint_is_described_in_one_line(tmp_path):
    state = tiny().state_dict()
    released = {
        "epoch": 7,
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "best_top1_acc": torch.tensor(71.438),
    }
    path = save(tmp_path / "file", released)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    description = str(read_checkpoint(path))
    assert description == f"{path} (released layout, epoch 7, top-1 71.44 %, sha256 {digest}...)"
    assert "unknown epoch, unknown top-1" in str(read_checkpoint(save(path, state)))
    early = {"state_dict": state, "epoch": -1}
    assert "within the first epoch" in str(read_checkpoint(save(path, early)))


def test_strict_loading_names_the_keys_that_do_not_fit_and_changes_no_weight():
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny().state_dict()
    del state["fc.bias"]
    state["feature.14.bias"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(10, 32)
    with pytest.raises(UserError) as caught:
        load_strictly(model, Checkpoint(Path("file"), "state dict alone", state, {}))
    assert str(caught.value).startswith(
        "file does not fit this ReActNetA: it lacks 1 tensors (fc.bias)"
        " and has left over 1 tensors (feature.14.bias)"
        " and has another shape for 1 tensors (fc.weight (10, 32) instead of (3, 32))"
    )
    assert not difference(model.state_dict(), before)


def test_a_second_run_on_a_folder_is_refused_until_the_first_is_dead(run_step, tmp_path):
    folder = tmp_path / "step1"
    program = (
        "import sys; from pathlib import Path; from utils.checkpoint.files import lock_directory\n"
        f"with lock_directory(Path({str(folder)!r})): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == b"locked\n"
        leftover = folder / f".{NEWEST}{UNFINISHED}"
        leftover.write_bytes(b"half a checkpoint")
        run_step(1).assert_one_sentence(f"{folder} is in use by another run", "--save")
        assert {path.name for path in folder.iterdir()} == {LOCK, leftover.name}
        holder.kill()
        holder.wait()
    assert run_step(1, epochs=1).code == 0
    assert [path.name for path in folder.glob(".*")] == [LOCK]


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


def test_a_file_of_another_program_has_no_seal_and_loads(tmp_path):
    path = tmp_path / "file"
    for zipped in (True, False):
        content = {"state_dict": {"weight": torch.zeros(3)}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert read_checkpoint(path).state["weight"].tolist() == [0, 0, 0]
