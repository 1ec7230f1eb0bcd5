"""Class folders of images, as torchvision lists them: SPLIT/CLASS/any depth/IMAGE."""

import os
from collections.abc import Callable
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.run.errors import UserError


def open_image_folder(root: Path, loader: Callable) -> ImageFolder:
    """torchvision's data set of the images in `root`/<class>/.

    Raises:
        UserError: there is no class, a class without images, or a folder that cannot be listed.
    """
    class_names(root)
    try:
        return ImageFolder(root, loader=loader)
    except OSError as error:
        raise UserError(
            f"{root} has a class without images: {error}; add some, or remove its folder"
        ) from error


def class_names(folder: Path) -> list[str]:
    """The folders in the folder of a split, sorted.

    Raises:
        UserError: there are none, or it cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
    if not names:
        raise UserError(f"{folder} has no classes: it must hold <class>/<images>")
    return names


def images_and_others(class_folder: Path) -> tuple[list[str], list[str]]:
    """All files of a class, at any depth: those named as images, and those training ignores."""
    images, others = [], []
    for folder, _, names in sorted(os.walk(class_folder, followlinks=True)):
        for name in sorted(names):
            is_image = name.lower().endswith(IMG_EXTENSIONS)
            (images if is_image else others).append(str(Path(folder) / name))
    return images, others


def is_folder(path: Path) -> bool:
    return path.is_dir()
