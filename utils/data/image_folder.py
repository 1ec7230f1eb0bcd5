"""Class folders of images, as training lists them: SPLIT/CLASS/any depth/IMAGE, links followed."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.run.errors import UserError


class ImageFolder(datasets.ImageFolder):
    """torchvision's, in its order; what cannot be listed or trained on is an `UserError`."""

    def find_classes(self, directory: Path | str) -> tuple[list[str], dict[str, int]]:
        classes = class_names(directory)
        return classes, {name: label for label, name in enumerate(classes)}

    @staticmethod
    def make_dataset(
        directory: str, class_to_idx: Mapping[str, int], *unused, **same
    ) -> list[tuple[str, int]]:
        images = {name: images_and_others(Path(directory) / name)[0] for name in class_to_idx}
        if empty := [name for name, paths in images.items() if not paths]:
            raise UserError(
                f"{directory} has a class without images ({', '.join(empty[:3])}):"
                f" add some, in files named {', '.join(IMG_EXTENSIONS)}, or remove its folder"
            )
        return [(path, class_to_idx[name]) for name, paths in images.items() for path in paths]


def class_names(folder: Path | str) -> list[str]:
    """The folders in the folder of a split, sorted.

    Raises:
        UserError: there are none, or it cannot be listed.
    """
    names = sorted(entry.name for entry in _listed(folder) if is_folder(entry))
    if not names:
        raise UserError(f"{folder} has no classes: it must hold <class>/<images>")
    return names


def images_and_others(class_folder: Path) -> tuple[list[str], list[str]]:
    """All files of a class, at any depth: those named as images, and those training ignores.

    Raises:
        UserError: a folder cannot be listed, or a link leads back.
    """
    images, others = [], []
    for _, files in sorted(_folders_below(str(class_folder))):
        for path in sorted(files):
            (images if path.lower().endswith(IMG_EXTENSIONS) else others).append(path)
    return images, others


def _folders_below(folder: str, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """`folder` and all folders in it, each with its files; `above` are those on the way to it."""
    place = Path(folder).resolve()
    if place in above:
        raise UserError(f"{folder} is a link back to {place}, which it lies in: remove it")
    folders, files = [], []
    for entry in _listed(folder):
        (folders if is_folder(entry) else files).append(entry.path)
    yield folder, files
    for inner in folders:
        yield from _folders_below(inner, (*above, place))


def _listed(folder: Path | str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error


def is_folder(path: Path | os.DirEntry) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to itself, a name that is too long
        return False
