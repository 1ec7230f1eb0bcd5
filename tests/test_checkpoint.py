"""Checkpoints: whole or absent, data only, strict."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from models import build_model
from models.teacher import load_teacher
from utils.checkpoint.checkpoint import Checkpoint, load_strictly, read_checkpoint, atomic_write
from utils.run.errors import UserError

CPU = torch.device("cpu")


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_torch_save_is_one_sentence(tmp_path):
    def save_to_a_full_disk(_):
        with Path("/dev/full").open("wb") as full:
            torch.save({"a": torch.zeros(10**6)}, full)

    with pytest.raises(UserError, match="cannot write") as caught:
        atomic_write(tmp_path / "x", save_to_a_full_disk)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


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


def test_a_truncated_checkpoint_is_one_sentence_wherever_it_is_cut(tmp_path):
    whole = save(tmp_path / "whole", {"state_dict": tiny().state_dict()}).read_bytes()
    cut = tmp_path / "cut"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            read_checkpoint(cut)
        assert str(cut) in str(caught.value) and "\n" not in str(caught.value)


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


def test_an_epoch_that_is_no_number_is_one_sentence(tmp_path):
    content = {"state_dict": tiny().state_dict(), "epoch": "three"}
    with pytest.raises(UserError, match="its epoch is not a number"):
        str(read_checkpoint(save(tmp_path / "file", content)))


def test_text_a_folder_and_a_missing_file_are_no_checkpoints(tmp_path):
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    for path, words in (
        (tmp_path / "text", "is not a checkpoint"),
        (tmp_path, "cannot read checkpoint"),
        (tmp_path / "missing", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            read_checkpoint(path)


LAYOUTS = {
    "state dict alone": lambda state: state,
    "released layout": lambda state: {
        "epoch": 7,
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "best_top1_acc": torch.tensor(71.438),
        "optimizer": {},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_load_strictly_and_are_told(tmp_path, layout):
    state = tiny().state_dict()
    checkpoint = read_checkpoint(save(tmp_path / "file", LAYOUTS[layout](state)))
    other = tiny()
    load_strictly(other, checkpoint)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    assert checkpoint.layout == layout and layout in str(checkpoint)


def test_what_was_loaded_is_told(tmp_path):
    state = tiny().state_dict()
    path = save(tmp_path / "file", LAYOUTS["released layout"](state))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    told = str(read_checkpoint(path))
    assert told == f"{path} (released layout, epoch 7, top-1 71.44 %, sha256 {digest}...)"
    assert "unknown epoch, unknown top-1" in str(read_checkpoint(save(path, state)))


def test_flat_kernels_of_the_older_layout_load(tmp_path):
    state = tiny().state_dict()
    older = {
        f"{key}s" if "binary" in key else key: value.reshape(-1, 1) if "binary" in key else value
        for key, value in state.items()
    }
    other = tiny()
    load_strictly(other, read_checkpoint(save(tmp_path / "file", {"state_dict": older})))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())


def held(state: dict) -> Checkpoint:
    return Checkpoint(Path("file"), "state dict alone", state, {})


def test_strict_loading_names_missing_left_over_and_misshapen_keys():
    state = tiny().state_dict()
    del state["fc.bias"]
    state["feature.14.bias"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(10, 32)
    with pytest.raises(UserError) as caught:
        load_strictly(tiny(), held(state))
    assert str(caught.value).startswith(
        "file does not fit this ReActNetA: it lacks 1 tensors (fc.bias)"
        " and has left over 1 tensors (feature.14.bias)"
        " and has another shape for 1 tensors (fc.weight (10, 32) instead of (3, 32))"
    )


def test_a_refused_state_changes_no_weight():
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny().state_dict()
    del state["fc.bias"]
    with pytest.raises(UserError):
        load_strictly(model, held(state))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_teacher_and_unknown_teachers():
    assert load_teacher(None, None, 3, 32, CPU) is None
    with pytest.raises(UserError, match="neither a torchvision network, nor a checkpoint"):
        load_teacher("resnet35", None, 3, 32, CPU)


def test_torchvision_teacher_from_a_file_is_frozen_and_in_eval_mode(tmp_path):
    from torchvision.models import resnet18

    reference = resnet18(num_classes=3)
    path = save(tmp_path / "resnet18.pth", reference.state_dict())
    teacher = load_teacher("resnet18", str(path), 3, 32, CPU)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(images), reference.eval()(images))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(UserError, match="has 3 classes and the data 10"):
        load_teacher("resnet18", str(path), 10, 32, CPU)
    with pytest.raises(UserError, match="does not fit this ResNet"):
        load_teacher("resnet34", str(path), 3, 32, CPU)


def test_a_failed_download_names_the_option_for_a_file(monkeypatch):
    from urllib.error import URLError

    import torchvision

    def no_network(name, weights):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(UserError, match="pass --teacher_checkpoint"):
        load_teacher("resnet34", None, 1000, 32, CPU)
