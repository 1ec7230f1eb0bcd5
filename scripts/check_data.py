"""Check an image folder before training: decode every image, and count.

python scripts/check_data.py /path/to/imagenet [--workers 16]
"""

import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchvision.datasets import ImageFolder
from tqdm import tqdm

from utils.data.decode import whole_image
from utils.data.image_folder import IMAGENET_CLASSES, IMAGENET_IMAGES, open_image_folder
from utils.data.loader import usable_cores
from utils.run.command_line import Parser, command, markdown_table, positive, printable
from utils.run.errors import UserError


@dataclass(frozen=True)
class Split:
    """What is in one of the two folders."""

    folder: Path
    images: Counter[str]  # of each class
    unreadable: list[str]


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="with train/<class>/ and val/<class>/")
    parser.add_argument("--val_dir", default="val", help="name of the validation folder")
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="processes")
    parser.add_argument("--classes", action="store_true", help="also print the count of each class")
    arguments = parser.parse_args()
    folders = arguments.folder / "train", arguments.folder / arguments.val_dir
    listed = [open_image_folder(folder, whole_image, allow_empty=True) for folder in folders]
    train, val = (check(images, arguments.workers) for images in listed)
    print(summary(train, val))
    if arguments.classes:
        names = sorted({*train.images, *val.images})
        counts = [[printable(n), str(train.images[n]), str(val.images[n])] for n in names]
        print(markdown_table([["class", "train", "val"], *counts]))
    for path in train.unreadable + val.unreadable:
        print(printable(f"unreadable: {path}"))
    if message := "; ".join(problems(train, val)):
        raise UserError(message)


def check(listed: ImageFolder, workers: int) -> Split:
    """Count a split's images and decode all of them."""
    folder = Path(listed.root)
    images = Counter(dict.fromkeys(listed.classes, 0))
    images.update(listed.classes[target] for target in listed.targets)
    paths = [path for path, _ in listed.samples]
    with ProcessPoolExecutor(workers) as pool:
        results = tqdm(pool.map(is_readable, paths, chunksize=64), folder.name, len(paths))
        unreadable = [path for path, good in zip(paths, results, strict=True) if not good]
    return Split(folder, images, unreadable)


def is_readable(path: str) -> bool:
    try:
        whole_image(path)
    except UserError:
        return False
    return True


def summary(train: Split, val: Split) -> str:
    """Counts of both splits beside ImageNet's."""
    splits = train, val
    counts = {
        "images": [split.images.total() for split in splits],
        "ImageNet's images": IMAGENET_IMAGES.values(),
        "classes": [len(split.images) for split in splits],
        "ImageNet's classes": [IMAGENET_CLASSES] * 2,
        "smallest class": [min(split.images.values()) for split in splits],
        "largest class": [max(split.images.values()) for split in splits],
        "unreadable": [len(split.unreadable) for split in splits],
    }
    rows = [[name, *(f"{number:,}" for number in pair)] for name, pair in counts.items()]
    return markdown_table([["", "train", "val"], *rows])


def problems(train: Split, val: Split) -> list[str]:
    """Why this folder cannot be trained on."""
    messages = []
    for split in (train, val):
        if empty := [name for name, count in split.images.items() if count == 0]:
            messages.append(f"{split.folder} has classes without images ({', '.join(empty[:3])})")
        if split.unreadable:
            messages.append(f"{split.folder} has {len(split.unreadable)} unreadable images")
    if differing := sorted(set(train.images) ^ set(val.images)):
        messages.append(f"only one of the two folders has the classes {', '.join(differing[:3])}")
    return messages


if __name__ == "__main__":
    main()
