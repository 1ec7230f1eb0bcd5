"""Decoders of training images, which give the same bytes, and resizing, which may differ by 2."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, STEP1, dist_env
from PIL import Image

from utils.data.dataset import open_train_images, open_val_images
from utils.data.decode import CroppedImage, whole_image
from utils.data.loader import train_loader
from utils.data.transforms import RESIZE, TrainTransform
from utils.run.command_line import one_sentence
from utils.run.config import parse_config
from utils.run.errors import UserError

READERS = {"pil": whole_image, "nvimagecodec": CroppedImage}


@pytest.fixture
def codec():
    return pytest.importorskip("nvidia.nvimgcodec")


@pytest.fixture(params=READERS)
def decoder(request):
    if request.param != "pil":
        pytest.importorskip("nvidia.nvimgcodec")
    return request.param


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blocks of random colours, whose edges show whatever a decoder does differently."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def write_all_kinds(folder: Path) -> None:
    image = noise(217, 131)
    image.save(folder / "420.jpg", subsampling=2)
    image.save(folder / "422.jpg", subsampling=1)
    image.save(folder / "444.jpg", subsampling=0)
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "restarts.jpg", restart_marker_blocks=3)
    image.save(folder / "stored_as_rgb.jpg", keep_rgb=True)
    image.save(folder / "turned.jpg", exif=turned())
    image.convert("L").save(folder / "gray.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "colours.png")
    image.convert("L").save(folder / "gray.png")
    image.quantize(50).save(folder / "palette.png")
    image.convert("RGBA").save(folder / "transparent.png")
    image.save(folder / "png_inside.jpg", format="PNG")
    noise(3, 90).save(folder / "narrow.jpg")
    noise(90, 1).save(folder / "low.jpg")
    noise(1, 1).save(folder / "one.jpg")
    (folder / "trailing.jpg").write_bytes((folder / "420.jpg").read_bytes() + b"more")


@pytest.fixture
def config(own_images):
    write_all_kinds(own_images / "train" / CLASSES[0])
    small = ["--image_size", "24", "--val_resize", "24", "--batch_size", "8", "--workers", "0"]
    return parse_config(STEP1, ["--data", str(own_images), *small])


def epochs(config, count: int) -> list[torch.Tensor]:
    loader = train_loader(open_train_images(config), config, dist_env())
    batches = []
    for epoch in range(count):
        loader.set_epoch(epoch)
        batches += [part for batch in loader.loader for part in batch]
    return batches


@pytest.mark.parametrize("resize", ["pil", "torch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_decoder_gives_the_same_bytes_shifts_and_labels(codec, config, workers, resize):
    config = replace(config, resize=resize)
    released = epochs(config, 6)
    others = epochs(replace(config, decoder="nvimagecodec", workers=workers), 6)
    assert len(released) == len(others) and all(map(torch.equal, released, others))


def test_any_region_of_a_jpeg_has_the_pixels_of_the_whole(codec, tmp_path):
    draws = random.Random(0)
    path = tmp_path / "image.jpg"
    for seed in range(300):
        width, height = draws.randint(1, 120), draws.randint(1, 120)
        options = {"subsampling": draws.choice([0, 1, 2]), "progressive": draws.random() < 0.3}
        mode = draws.choice(["RGB", "RGB", "L", "CMYK"])
        noise(width, height, seed).convert(mode).save(path, **options)
        whole = whole_image(path)
        for _ in range(4):
            left, top = draws.randrange(width), draws.randrange(height)
            box = (left, top, draws.randint(left + 1, width), draws.randint(top + 1, height))
            region = np.asarray(CroppedImage(path).crop(box))
            assert np.array_equal(region, np.asarray(whole.crop(box))), (mode, options, box)


def test_most_jpegs_are_decoded_by_region(codec, tmp_path, monkeypatch):
    write_all_kinds(tmp_path)
    monkeypatch.setattr(CroppedImage, "_of_whole_image", lambda self, _: self.path.name)
    crops = [CroppedImage(path).crop((0, 0, 40, 40)) for path in sorted(tmp_path.iterdir())]
    whole = {crop for crop in crops if isinstance(crop, str)}
    assert whole == {
        *("cmyk.jpg", "trailing.jpg"),
        *("png_inside.jpg", "colours.png", "gray.png", "palette.png", "transparent.png"),
        *("narrow.jpg", "low.jpg", "one.jpg"),  # which a crop of 40 by 40 leaves
    }


def test_resizing_by_torch_moves_few_bytes_and_those_by_1_or_2(config):
    config = replace(config, image_size=224, val_resize=224)
    images = [noise(500, 375, seed) for seed in range(4)]
    images += [Image.effect_noise((500, 375), 90).convert("RGB"), noise(90, 60), noise(224, 224)]
    differences = []
    for seed, image in enumerate(images * 6):
        both = []
        for resize in ("pil", "torch"):
            torch.manual_seed(seed)
            pixels, _ = TrainTransform(replace(config, resize=resize))(image)
            both.append(pixels.int())
        differences.append((both[0] - both[1]).abs())
    differences = torch.stack(differences)
    assert differences.max() <= 2
    assert (differences > 1).float().mean() < 1e-3
    assert (differences > 0).float().mean() < 0.05


@pytest.mark.parametrize("damage", ["cut off", "no end", "no image", "empty"])
def test_a_damaged_jpeg_is_one_sentence_and_can_be_replaced(config, capfd, decoder, damage):
    path = Path(config.data) / "train" / CLASSES[0] / "420.jpg"
    whole = path.read_bytes()
    cut = {"cut off": len(whole) // 2, "no end": len(whole) - 2, "empty": 0}
    path.write_bytes(b"no image" if damage == "no image" else whole[: cut.get(damage, 0)])
    config = replace(config, decoder=decoder)
    with pytest.raises(UserError) as caught:
        epochs(config, 1)
    assert one_sentence(caught.value).startswith(f"cannot decode image {path} (")
    epochs(replace(config, skip_unreadable=1), 2)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "replaced, 1 of 1" in err


def test_the_image_taken_instead_is_augmented_the_same_by_all_decoders(codec, config):
    path = Path(config.data) / "train" / CLASSES[0] / "420.jpg"
    path.write_bytes(path.read_bytes()[:900])
    config = replace(config, skip_unreadable=1)
    both = [epochs(replace(config, decoder=decoder), 2) for decoder in READERS]
    assert all(map(torch.equal, *both))


def test_validation_images_are_read_whole_whatever_the_decoder(codec, config):
    val = open_val_images(replace(config, decoder="nvimagecodec"))
    assert val.images.loader is whole_image


def test_a_missing_package_is_one_sentence(monkeypatch, run_step):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    result = run_step(1, decoder="nvimagecodec")
    result.assert_one_sentence("nvidia-nvimgcodec", "requirements-decoder.txt")


def test_a_run_may_go_on_with_another_decoder_but_not_with_another_resizing(codec, run_step):
    assert run_step(1, epochs=1).code == 0
    assert run_step(1, epochs=1, decoder="nvimagecodec").code == 0
    run_step(1, epochs=1, resize="torch").assert_one_sentence("resize torch (there pil)")


@pytest.mark.parametrize("what", ["loader", "workers"])
def test_the_benchmark_takes_all_choices_in_turn(codec, run_script, tmp_path, what):
    small = ("--images", 2, "--image_size", 32, "--rounds", 1, "--output", tmp_path)
    result = run_script("benchmarks.speed", "--only", what, *small)
    assert result.code == 0, result.err
    (row,) = json.loads((tmp_path / "results.json").read_text())["loading"]
    choices = {f"decoder {decoder}, resize {resize}" for decoder in READERS for resize in RESIZE}
    assert {side.partition(", workers")[0] for side in row["seconds"]} - {"reference"} == choices
