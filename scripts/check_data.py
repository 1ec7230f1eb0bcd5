"""Whether an image folder can be trained on: decodes every image, counts, and tells oddities.

    python scripts/check_data.py /path/to/imagenet [--workers 16]

CMYK images are converted and EXIF orientations ignored, in training as here and in the released
code: they are told because other loaders treat them differently.
"""

import argparse
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from tqdm import tqdm

from utils.run.command_line import Parser, command, positive, printable
from utils.run.errors import UserError
from utils.checkpoint.files import is_folder
from utils.data.image_folder import class_names, images_and_others
from utils.run.command_line import print_table

IMAGENET = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = 1_000
ORIENTATION, UPRIGHT = 0x0112, 1  # the EXIF tag, and its value for an image that needs no turning
ODDITIES = ("CMYK", "EXIF orientation", "not of its suffix")
_SHOWN = 20


@dataclass
class Split:
    """What is in one of the two folders."""

    folder: Path
    images: Counter = field(default_factory=Counter)  # of each class
    ignored: int = 0  # files that training does not take for images
    found: dict[str, list[Path]] = field(default_factory=dict)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="with train/<class>/ and val/<class>/")
    parser.add_argument("--val_dir", default="val", help="name of the validation folder")
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="decoding processes"
    )
    parser.add_argument("--classes", action="store_true", help="also print the count of each class")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    splits = {
        name: check(arguments.folder / folder, arguments.workers)
        for name, folder in (("train", "train"), ("val", arguments.val_dir))
    }
    print_table([["", "train", "val"], *report_rows(splits)])
    if arguments.classes:
        names = sorted(set().union(*(split.images for split in splits.values())))
        counts = [
            [printable(name), *(str(split.images[name]) for split in splits.values())]
            for name in names
        ]
        print_table([["class", "train", "val"], *counts])
    for split in splits.values():
        for oddity, paths in split.found.items():
            for path in paths if oddity == "unreadable" else paths[:_SHOWN]:
                print(printable(f"{oddity}: {path}"))
    if problem := what_keeps_from_training(splits):
        raise UserError(problem)


def check(folder: Path, workers: int) -> Split:
    """List a split's classes and decode all of its images.

    Raises:
        UserError: no such folder, or one that cannot be listed.
    """
    if not is_folder(folder):
        raise UserError(f"data folder {folder} does not exist: it must hold <class>/<images>")
    split = Split(folder)
    paths: list[Path] = []
    for name in class_names(folder):
        images, others = images_and_others(folder / name)
        split.images[name] = len(images)
        split.ignored += len(others)
        paths += map(Path, images)
    with ProcessPoolExecutor(workers) as pool:
        decoded = pool.map(oddities_of, paths, chunksize=64)
        bar = functools.partial(tqdm, desc=folder.name, total=len(paths), file=sys.stderr)
        for path, oddities in zip(paths, bar(decoded), strict=True):
            for oddity in oddities:
                split.found.setdefault(oddity, []).append(path)
    return split


def oddities_of(path: Path) -> list[str]:
    """`unreadable`, or which of ODDITIES an image has."""
    try:
        with Image.open(path) as image:
            found = (
                image.mode == "CMYK",
                image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT,
                Image.registered_extensions().get(path.suffix.lower()) != image.format,
            )
            image.convert("RGB")
    except Exception:  # PIL raises many types for a file it cannot decode
        return ["unreadable"]
    return [name for name, holds in zip(ODDITIES, found, strict=True) if holds]


def report_rows(splits: dict[str, Split]) -> Iterator[list[str]]:
    columns = list(splits.items())
    yield ["images", *(f"{split.images.total():,}" for _, split in columns)]
    yield ["ImageNet's", *(f"{IMAGENET[name]:,}" for name, _ in columns)]
    yield ["classes", *(f"{len(split.images):,}" for _, split in columns)]
    yield ["ImageNet's", *(f"{IMAGENET_CLASSES:,}" for _ in columns)]
    for name, choose in (("smallest class", min), ("largest class", max)):
        yield [name, *(f"{choose(split.images.values(), default=0):,}" for _, split in columns)]
    for oddity in ("unreadable", *ODDITIES):
        yield [oddity, *(f"{len(split.found.get(oddity, ())):,}" for _, split in columns)]
    yield ["other files", *(f"{split.ignored:,}" for _, split in columns)]


def what_keeps_from_training(splits: dict[str, Split]) -> str:
    """One sentence, empty if nothing does."""
    train, val = splits.values()
    problems = []
    for split in (train, val):
        if empty := [name for name, count in split.images.items() if count == 0]:
            problems.append(f"{split.folder} has classes without images ({', '.join(empty[:3])})")
        if unreadable := split.found.get("unreadable"):
            problems.append(f"{split.folder} has {len(unreadable)} unreadable images")
    if differing := sorted(set(train.images) ^ set(val.images)):
        problems.append(f"only one of the two folders has the classes {', '.join(differing[:3])}")
    return "; ".join(problems)


if __name__ == "__main__":
    main()
