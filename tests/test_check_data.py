"""Image folders that are looked through before training, and images that cannot be read in it."""

import pytest
from conftest import CLASSES, TRAIN, VAL, write_images
from PIL import Image

from utils.checkpoint.checkpoint import NEWEST


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


def cells(text: str) -> dict[str, list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def test_a_sound_folder_is_counted(run_script, folder):
    result = run_script("check_data", folder, "--workers", "1", "--classes")
    assert result.code == 0, result.err
    found = cells(result.out)
    assert found["images"] == [str(len(CLASSES) * TRAIN), str(len(CLASSES) * VAL)]
    assert found["star"] == [str(TRAIN), str(VAL)]
    assert "1,281,167" in result.out and "50,000" in result.out


def test_oddities_are_named_and_what_cannot_be_trained_on_is_one_sentence(run_script, folder):
    train = folder / "train"
    image = Image.open(train / "star" / "0.png")
    image.convert("CMYK").save(train / "star" / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(train / "disc" / "turned.jpg", exif=exif)
    image.save(train / "bars" / "wrong.jpg", format="PNG")
    (train / "bars" / "notes.txt").write_text("no image")
    result = run_script("check_data", folder, "--workers", "1")
    assert result.code == 0, result.err
    for line in ("CMYK: ", "EXIF orientation: ", "not of its suffix: "):
        assert result.out.count(line) == 1
    assert cells(result.out)["other files"] == ["1", "0"]

    data = (train / "disc" / "turned.jpg").read_bytes()
    (train / "disc" / "turned.jpg").write_bytes(data[: len(data) // 2])
    (folder / "val" / "empty").mkdir()
    result = run_script("check_data", folder, "--workers", "1")
    assert f"unreadable: {train}/disc/turned.jpg" in result.out
    error = result.err.splitlines()[-1]
    for words in ("train has 1 unreadable images", "without images (empty)", "the classes empty"):
        assert error.startswith("error: ") and words in error


def test_a_missing_folder_is_one_sentence(run_script, tmp_path):
    run_script("check_data", tmp_path / "no").assert_one_sentence("does not exist")


@pytest.mark.parametrize("target", ["..", "../../val", "../disc"])
def test_links_that_lead_back_are_refused_alike_and_others_followed_alike(
    run_script, run_step, folder, target
):
    (folder / "val" / "bars" / "all").symlink_to("../..")
    (folder / "train" / "star" / "link").symlink_to(target)
    for result in (run_script("check_data", folder, "--workers", "1"), run_step(1, data=folder)):
        assert result.code == 2
        assert "is a link back to" in result.err.splitlines()[-1]
    (folder / "val" / "bars" / "all").unlink()
    checked = run_script("check_data", folder, "--workers", "1")
    trained = run_step(1, data=folder, epochs=1)
    assert checked.code == trained.code == (2 if target == ".." else 0)


def test_a_link_to_nothing_is_an_unreadable_image(run_script, run_step, folder):
    link = folder / "train" / "star" / "gone.png"
    link.symlink_to("nothing")
    assert f"unreadable: {link}" in run_script("check_data", folder, "--workers", "1").out
    run_step(1, data=folder).assert_one_sentence(f"cannot decode image {link}")


def test_names_that_break_a_line_or_are_no_utf8_are_escaped(run_script, run_step, folder):
    broken = folder / "train" / "star" / "two\nlines\udcff.png"
    broken.write_bytes(b"no image")
    escaped = "star/two\\nlines\\udcff.png"
    assert escaped in run_script("check_data", folder, "--workers", "1").out
    run_step(1, data=folder).assert_one_sentence(escaped)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_replaced_and_counted_up_to_the_number_allowed(
    run_step, tmp_path, folder, workers
):
    broken = [folder / "train" / "star" / f"{index}.png" for index in (2, 3)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    options = {"data": folder, "workers": workers}
    assert "cannot decode image" in run_step(1, **options).err
    refused = run_step(1, skip_unreadable=1, **options)
    assert refused.code == 2
    assert "2 images are unreadable and skip_unreadable is 1" in refused.err.splitlines()[-1]
    assert not (tmp_path / "step1" / NEWEST).exists()
    result = run_step(1, skip_unreadable=2, **options)
    assert result.code == 0, result.err
    assert (tmp_path / "step1" / NEWEST).exists()


def test_unreadable_validation_images_are_never_replaced(run_step, folder):
    broken = folder / "val" / "star" / "2.png"
    broken.write_bytes(b"no image")
    run_step(1, data=folder, skip_unreadable=9).assert_one_sentence(f"cannot decode image {broken}")
