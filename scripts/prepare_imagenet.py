"""Make train/<class>/ and val/<class>/ of ImageNet's archives, or sort a val/ without classes.

    python scripts/prepare_imagenet.py ARCHIVES DIR

ARCHIVES holds what image-net.org offers: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz, each needed only for what DIR lacks.  Where DIR/val holds images
without class folders, they are moved, with the devkit alone.  The same command goes on after an
interruption: a split gets its name once it is complete, and both are counted at the end.
"""

import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchvision.datasets.imagenet import ARCHIVE_META, load_meta_file, parse_devkit_archive
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from utils.data.decode import whole_image
from utils.data.image_folder import IMAGENET_CLASSES, IMAGENET_IMAGES, open_image_folder
from utils.run.command_line import Parser, command
from utils.run.errors import UserError

VAL_IMAGES = "ILSVRC2012_val_*.JPEG"


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("archives", type=Path, help="folder of the three archives")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of train/ and val/")
    arguments = parser.parse_args()
    try:
        prepare(arguments.archives, arguments.folder)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot fill {arguments.folder}: {error}") from error
    check_counts(arguments.folder)


def prepare(archives: Path, folder: Path) -> None:
    """Make the splits that `folder` lacks."""
    train, val, unsorted = (folder / name for name in ("train", "val", ".val.unsorted"))
    is_flat = any(val.glob(VAL_IMAGES))
    needed = {
        "train": not train.exists(),
        "val": not val.exists() and not unsorted.exists(),
        "devkit": not val.exists() or is_flat,
    }
    if needed["devkit"]:
        check_scipy()
    paths = check_archives(archives, [name for name in needed if needed[name]])
    wnids = val_wnids(paths["devkit"]) if needed["devkit"] else []
    if needed["train"]:
        unpack_train(paths["train"], train)
    if needed["val"]:
        unpack_val(paths["val"], unsorted)
    if is_flat:
        val.rename(unsorted)
    if needed["devkit"]:
        sort_val(unsorted, wnids)
        unsorted.rename(val)


def check_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the classes in the devkit are a MATLAB file, which needs the package scipy:"
            " python -m pip install scipy"
        ) from error


def check_archives(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where the archives are, which are all there and undamaged."""
    paths = {name: folder / ARCHIVE_META[name][0] for name in names}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: https://image-net.org offers them after"
            " registration"
        )
    for name, path in paths.items():
        print(f"checking {path} ({path.stat().st_size / 1e9:.1f} GB)", flush=True)
        md5 = ARCHIVE_META[name][1]
        if not check_integrity(path, md5):
            raise UserError(f"{path} is damaged: its MD5 is not {md5}; fetch it again")
    return paths


def val_wnids(devkit: Path) -> list[str]:
    """The class of each validation image, in the order of their numbers."""
    with TemporaryDirectory() as folder:
        parse_devkit_archive(folder, str(devkit.absolute()))
        return load_meta_file(folder)[1]


def unpack_train(archive: Path, train: Path) -> None:
    """Unpack an archive of one archive for each class; classes that are complete are kept."""
    unfinished = train.with_name(".train.unfinished")
    with tarfile.open(archive) as classes:
        for member in tqdm(classes.getmembers(), "train", unit="class"):
            folder = unfinished / Path(member.name).stem
            if not folder.exists():
                partial = folder.with_name(f".{folder.name}")
                with tarfile.open(fileobj=classes.extractfile(member)) as images:
                    extract(images, partial)
                partial.rename(folder)
    unfinished.rename(train)


def unpack_val(archive: Path, unsorted: Path) -> None:
    unfinished = unsorted.with_name(".val.unfinished")
    with tarfile.open(archive) as images:
        members = tqdm(images, "val", IMAGENET_IMAGES["val"], unit="image")
        extract(images, unfinished, members)
    unfinished.rename(unsorted)


def extract(archive: tarfile.TarFile, folder: Path, members: Iterable | None = None) -> None:
    # Python has filters since 3.11.4, and Debian 12 has 3.11.2.
    archive.extraction_filter = getattr(tarfile, "data_filter", None)
    archive.extractall(folder, members)


def sort_val(folder: Path, wnids: Sequence[str]) -> None:
    """Move the validation images into folders of their classes; an image's name has its number."""
    for path in sorted(folder.glob(VAL_IMAGES)):
        of_class = folder / wnids[int(path.stem.rpartition("_")[2]) - 1]
        of_class.mkdir(exist_ok=True)
        path.rename(of_class / path.name)


def check_counts(folder: Path) -> None:
    for split, expected in IMAGENET_IMAGES.items():
        images = open_image_folder(folder / split, whole_image, allow_empty=True)
        count = f"{len(images):,} images in {len(images.classes):,} classes"
        print(f"{folder / split}: {count}")
        if (len(images), len(images.classes)) != (expected, IMAGENET_CLASSES):
            raise UserError(
                f"{folder / split} holds {count} instead of {expected:,} in {IMAGENET_CLASSES:,}:"
                " where you have its archive, remove it, and the same command makes it again"
            )


if __name__ == "__main__":
    main()
