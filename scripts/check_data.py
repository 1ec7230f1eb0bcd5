"""Check an image folder before training: decode every image, count, and list unusual files.

    python scripts/check_data.py /path/to/imagenet [--workers 16]

CMYK images are converted and EXIF orientations ignored, in training as here and in the released
code: they are listed because other loaders treat them differently.
"""

import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from PIL.ExifTags import Base
from tqdm import tqdm

from utils.data.image_folder import class_names, images_and_others, is_folder
from utils.run.command_line import Parser, command, markdown_table, positive, printable
from utils.run.errors import UserError

ISSUES = ("unreadable", "CMYK", "EXIF orientation", "wrong suffix")
LISTED = 20  # files of each issue but unreadable ones, of which all are listed


@dataclass
class Split:
    """What is in one of the two folders."""

    folder: Path
    images: Counter = field(default_factory=Counter)  # of each class
    other_files: int = 0  # that training ignores
    issues: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="with train/<class>/ and val/<class>/")
    parser.add_argument("--val_dir", default="val", help="name of the validation folder")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--classes", action="store_true", help="also print the count of each class")
    arguments = parser.parse_args()
    train = check(arguments.folder / "train", arguments.workers)
    val = check(arguments.folder / arguments.val_dir, arguments.workers)
    print(summary(train, val))
    if arguments.classes:
        names = sorted({*train.images, *val.images})
        counts = [[printable(n), str(train.images[n]), str(val.images[n])] for n in names]
        print(markdown_table([["class", "train", "val"], *counts]))
    for split in (train, val):
        for issue in ISSUES:
            for path in split.issues[issue][: None if issue == "unreadable" else LISTED]:
                print(printable(f"{issue}: {path}"))
    if message := "; ".join(problems(train, val)):
        raise UserError(message)


def check(folder: Path, workers: int) -> Split:
    """List a split's classes and decode all of its images."""
    if not is_folder(folder):
        raise UserError(f"data folder {folder} does not exist: it must hold <class>/<images>")
    split = Split(folder)
    paths: list[Path] = []
    for name in class_names(folder):
        images, others = images_and_others(folder / name)
        split.images[name] = len(images)
        split.other_files += len(others)
        paths += map(Path, images)
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(issues_of, paths, chunksize=64)
        for path, issues in zip(paths, tqdm(results, folder.name, len(paths)), strict=True):
            for issue in issues:
                split.issues[issue].append(path)
    return split


def issues_of(path: Path) -> list[str]:
    """Which of ISSUES an image has."""
    try:
        with Image.open(path) as image:
            of_suffix = Image.registered_extensions().get(path.suffix.lower())
            issues = {
                "CMYK": image.mode == "CMYK",
                "EXIF orientation": image.getexif().get(Base.Orientation, 1) != 1,  # 1: upright
                "wrong suffix": of_suffix != image.format,
            }
            image.convert("RGB")
    except Exception:  # PIL raises many types for a file it cannot decode
        return ["unreadable"]
    return [issue for issue, is_present in issues.items() if is_present]


def summary(train: Split, val: Split) -> str:
    """Counts of both splits beside ImageNet's."""
    counts = {
        "images": [split.images.total() for split in (train, val)],
        "ImageNet's images": [1_281_167, 50_000],
        "classes": [len(split.images) for split in (train, val)],
        "ImageNet's classes": [1_000, 1_000],
        "smallest class": [min(split.images.values()) for split in (train, val)],
        "largest class": [max(split.images.values()) for split in (train, val)],
    }
    counts |= {issue: [len(split.issues[issue]) for split in (train, val)] for issue in ISSUES}
    counts["other files"] = [train.other_files, val.other_files]
    rows = [[name, *(f"{number:,}" for number in pair)] for name, pair in counts.items()]
    return markdown_table([["", "train", "val"], *rows])


def problems(train: Split, val: Split) -> list[str]:
    """Why this folder cannot be trained on."""
    messages = []
    for split in (train, val):
        if empty := [name for name, count in split.images.items() if count == 0]:
            messages.append(f"{split.folder} has classes without images ({', '.join(empty[:3])})")
        if unreadable := split.issues["unreadable"]:
            messages.append(f"{split.folder} has {len(unreadable)} unreadable images")
    if differing := sorted(set(train.images) ^ set(val.images)):
        messages.append(f"only one of the two folders has the classes {', '.join(differing[:3])}")
    return messages


if __name__ == "__main__":
    main()
