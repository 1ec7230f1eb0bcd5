"""Image folders that are looked through before training, and images that cannot be read in it."""

import pytest
from conftest import CLASSES, TRAIN, VAL

from utils.checkpoint.checkpoint import NEWEST


@pytest.fixture
def check(run_script, own_images):
    return lambda *flags: run_script("check_data", own_images, "--workers", "1", *flags)


def cells(text: str) -> dict[str, list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def test_a_sound_folder_is_counted(check):
    result = check("--classes")
    assert result.code == 0, result.err
    counts = cells(result.out)
    assert counts["images"] == [str(len(CLASSES) * TRAIN), str(len(CLASSES) * VAL)]
    assert counts["star"] == [str(TRAIN), str(VAL)]
    assert "1,281,167" in result.out and "50,000" in result.out


def test_what_stops_training_is_one_sentence_and_each_unreadable_image_is_listed(check, own_images):
    cut_off = own_images / "train" / "disc" / "0.png"
    cut_off.write_bytes(cut_off.read_bytes()[:100])
    (own_images / "val" / "empty").mkdir()
    (own_images / "val" / "star" / "notes.txt").write_text("no image")
    result = check()
    assert result.code == 2
    assert result.out.count("unreadable: ") == 1 and f"unreadable: {cut_off}" in result.out
    assert cells(result.out)["images"] == [str(len(CLASSES) * TRAIN), str(len(CLASSES) * VAL)]
    error = result.err.splitlines()[-1]
    for words in ("train has 1 unreadable images", "without images (empty)", "the classes empty"):
        assert error.startswith("error: ") and words in error


def test_images_without_class_folders_are_counted_and_the_command_that_sorts_them_is_named(
    check, run_step, own_images
):
    val = own_images / "val"
    for folder in list(val.iterdir()):
        for image in list(folder.iterdir()):
            image.rename(val / f"{folder.name}_{image.name}")
        folder.rmdir()
    words = (
        f"{val} holds {len(CLASSES) * VAL} images and no class folders",
        f"scripts/prepare_imagenet.py ARCHIVES {own_images} ",
    )
    run_step(1, data=own_images).assert_one_sentence(*words)
    result = check()
    assert result.code == 2 and all(word in result.err.splitlines()[-1] for word in words)


def test_a_missing_folder_is_one_sentence(run_script, tmp_path):
    run_script("check_data", tmp_path / "no").assert_one_sentence("cannot list", "<class>/")


def test_a_wrong_name_of_the_validation_folder_is_told_before_anything_is_decoded(check):
    check("--val_dir", "test").assert_one_sentence("cannot list", "test")


def test_a_link_to_nothing_is_an_unreadable_image_and_odd_names_are_escaped(
    check, run_step, own_images
):
    link = own_images / "train" / "star" / "two\nlines\udcff.png"
    link.symlink_to("nothing")
    escaped = "star/two\\nlines\\udcff.png"
    assert escaped in check().out
    run_step(1, data=own_images).assert_one_sentence("cannot read image", escaped)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_replaced_and_counted_up_to_the_number_allowed(
    run_step, tmp_path, own_images, workers
):
    broken = [own_images / "train" / "star" / f"{index}.png" for index in (2, 3)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    options = {"data": own_images, "workers": workers}
    assert "cannot decode image" in run_step(1, **options).err
    refused = run_step(1, skip_unreadable=1, **options)
    assert refused.code == 2
    assert "2 images are unreadable and skip_unreadable is 1" in refused.err.splitlines()[-1]
    assert not (tmp_path / "step1" / NEWEST).exists()
    result = run_step(1, skip_unreadable=2, **options)
    assert result.code == 0, result.err
    assert (tmp_path / "step1" / NEWEST).exists()


def test_unreadable_validation_images_are_never_replaced(run_step, own_images):
    broken = own_images / "val" / "star" / "2.png"
    broken.write_bytes(b"no image")
    result = run_step(1, data=own_images, skip_unreadable=9)
    result.assert_one_sentence(f"cannot decode image {broken}")
