"""Class folders of images, as torchvision lists them: SPLIT/CLASS/any depth/IMAGE."""

import os
from collections.abc import Callable
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from utils.run.errors import UserError

IMAGENET_CLASSES = 1_000
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}


def open_image_folder(root: Path, loader: Callable, allow_empty: bool = False) -> ImageFolder:
    """torchvision's data set of the images in `root`/<class>/.

    Raises:
        UserError: there is no class, or a class without images unless `allow_empty`.
    """
    names = class_names(root)
    images = ImageFolder(root, loader=loader, allow_empty=True)
    empty = sorted({*range(len(names))} - {*images.targets})
    if empty and not allow_empty:
        raise UserError(
            f"{root} has a class without images ({', '.join(names[i] for i in empty[:3])}):"
            " add some, or remove its folder"
        )
    return images


def class_names(folder: Path) -> list[str]:
    """The folders in the folder of a split, sorted.

    Raises:
        UserError: there are none, or it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise UserError(
            f"cannot list {folder} ({error.strerror}): it must hold <class>/<images>"
        ) from error
    names = sorted(name for name in is_folder if is_folder[name])
    if not names:
        raise UserError(
            f"{folder} holds {sum(map(is_image_file, is_folder)):,} images and no class folders:"
            " sort them into <class>/<images>, as for ImageNet"
            f" python scripts/prepare_imagenet.py ARCHIVES {folder.parent} does"
        )
    return names


def class_names_of_network(folder: Path, outputs: int) -> list[str]:
    """The names of a network's classes, in the order of its outputs.

    Raises:
        UserError: `folder` has another number of class folders.
    """
    names = class_names(folder)
    if len(names) != outputs:
        raise UserError(
            f"the network has {outputs} classes and {folder} {len(names)} folders:"
            " pass the train/ folder of the data it was trained on"
        )
    return names
