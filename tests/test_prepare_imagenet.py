"""ImageNet's archives, in small, become class folders; so does a flat validation folder."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from scripts import prepare_imagenet
from utils.data.image_folder import class_names

NAMES = {name: meta[0] for name, meta in prepare_imagenet.ARCHIVE_META.items()}
WNIDS = ("n02", "n01")  # in the devkit's order, which is not that of the names
TRUTH = (1, 2, 2, 1)  # the devkit's class of each validation image
VAL = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
SORTED = {"n01": VAL[1:3], "n02": [VAL[0], VAL[3]]}


def archive(path: Path, files: dict[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def archives(tmp_path, monkeypatch) -> Path:
    """Two classes of three images to train on, four images to validate on, and the devkit."""
    folder = tmp_path / "archives"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    image = buffer.getvalue()
    classes = {
        f"{wnid}.tar": archive(tmp_path / "x", {f"{wnid}_{i}.JPEG": image for i in range(3)})
        for wnid in WNIDS
    }
    archive(folder / NAMES["train"], classes)
    archive(folder / NAMES["val"], dict.fromkeys(VAL, image))
    data = "ILSVRC2012_devkit_t12/data/"
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    files = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": truth}
    archive(folder / NAMES["devkit"], {data + k: v for k, v in files.items()}, "w:gz")
    # What scipy reads of meta.mat: number, class, words, gloss, children; a class with children
    # is none of the thousand.
    synsets = [(1, WNIDS[0], "a, b", "", 0), (2, WNIDS[1], "c", "", 0), (3, "n00", "d", "", 2)]
    scipy = SimpleNamespace(loadmat=lambda *_, **__: {"synsets": synsets})
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace(io=scipy))
    monkeypatch.setitem(sys.modules, "scipy.io", scipy)
    for key, name in NAMES.items():
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(prepare_imagenet.ARCHIVE_META, key, (name, md5))
    monkeypatch.setattr(prepare_imagenet, "IMAGENET_CLASSES", 2)
    monkeypatch.setattr(prepare_imagenet, "IMAGENET_IMAGES", {"train": 6, "val": 4})
    return folder


@pytest.fixture
def prepare(run_script, archives, tmp_path):
    return lambda: run_script("prepare_imagenet", archives, tmp_path / "data")


def assert_complete(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    assert class_names(folder / "train") == ["n01", "n02"]
    assert len(list((folder / "train").glob("n0?/n0?_?.JPEG"))) == 6
    for name in class_names(folder / "val"):
        assert sorted(path.name for path in (folder / "val" / name).iterdir()) == SORTED[name]


def test_archives_become_class_folders_and_are_needed_no_more(prepare, archives, tmp_path):
    result = prepare()
    assert result.code == 0, result.err
    assert "train: 6 images in 2 classes" in result.out
    assert_complete(tmp_path / "data")
    for path in archives.iterdir():
        path.unlink()
    assert prepare().code == 0


@pytest.mark.parametrize("done", range(9))
def test_an_interrupted_preparation_shows_no_unfinished_split_and_goes_on(
    prepare, tmp_path, monkeypatch, done
):
    def rename(path: Path, target: Path) -> None:
        if next(renames, None) is None:
            raise KeyboardInterrupt
        path.replace(target)

    renames = iter(range(done))
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        assert prepare().code == "interrupted"
    assert (folder / "train").exists() == (done > 2) and not (folder / "val").exists()
    assert prepare().code == 0
    assert_complete(folder)


def test_a_flat_validation_folder_is_sorted_with_the_devkit_alone(prepare, archives, tmp_path):
    assert prepare().code == 0
    val = tmp_path / "data" / "val"
    for wnid, names in SORTED.items():
        for name in names:
            (val / wnid / name).rename(val / name)
        (val / wnid).rmdir()
    for split in ("train", "val"):
        (archives / NAMES[split]).unlink()
    assert prepare().code == 0
    assert_complete(tmp_path / "data")


def test_missing_and_damaged_archives_and_wrong_counts_are_named(prepare, archives, tmp_path):
    (archives / NAMES["val"]).write_bytes(b"other")
    prepare().assert_one_sentence(f"{NAMES['val']} is damaged", "MD5")
    (archives / NAMES["val"]).unlink()
    (archives / NAMES["train"]).unlink()
    prepare().assert_one_sentence(f"lacks {NAMES['train']}, {NAMES['val']}: ")
    assert not (tmp_path / "data").exists()
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n01").mkdir(parents=True)
    prepare().assert_one_sentence("train holds 0 images in 1 classes instead of 6 in 2")


def test_without_scipy_the_package_to_install_is_named(prepare, archives, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    prepare().assert_one_sentence("pip install scipy")
    assert not (tmp_path / "data").exists()
