"""The network whose softmax is the student's target."""

from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import nn

from models.loading import load_network
from utils.checkpoint import load_strictly, read_checkpoint
from utils.command_line import printable
from utils.engine import count_outputs
from utils.errors import InputError
from utils.files import is_there
from utils.limits import is_out_of_memory


def load_teacher(
    name: str | None,
    weights_file: str | None,
    num_classes: int,
    image_size: int,
    device: torch.device,
) -> nn.Module | None:
    """The teacher in eval mode and without gradients, or None where labels are the target.

    Args:
        name: a torchvision network (its pretrained weights are downloaded by torchvision), the
            path of a checkpoint trained by this repo, or None.
        weights_file: state dict for the torchvision network, in place of the download.
        num_classes: of the data; the teacher must have as many.
        image_size: of the data; pixels, height and width.

    Raises:
        InputError: unknown name, no download, a file that does not fit, or another class count.
    """
    if name is None:
        return None
    # The weights it is built with are replaced; drawing them must not move the run's generator.
    with torch.random.fork_rng(devices=[]):
        teacher = _build(name, weights_file)
    teacher = teacher.to(device).eval().requires_grad_(False)
    classes = _classes(teacher, name, image_size, device)
    if classes != num_classes:
        raise InputError(
            f"the teacher {name} has {classes} classes and the data {num_classes}: pass a --teacher"
            " trained on this data, or --teacher none to train on labels"
        )
    return teacher


def _classes(teacher: nn.Module, name: str, image_size: int, device: torch.device) -> int:
    try:
        return count_outputs(teacher, image_size, device)
    except (AssertionError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        said = printable(str(error).partition("\n")[0])
        raise InputError(
            f"the teacher {name} cannot compute images of {image_size} pixels ({said}):"
            " pass another --image_size or another --teacher"
        ) from error


def _build(name: str, weights_file: str | None) -> nn.Module:
    if name in torchvision.models.list_models(torchvision.models):
        return _torchvision_network(name, weights_file)
    if is_there(Path(name)):
        return load_network(name).model
    raise InputError(
        f"teacher {name!r} is neither a torchvision network, nor a checkpoint file, nor none"
    )


def _torchvision_network(name: str, weights_file: str | None) -> nn.Module:
    if weights_file is not None:
        checkpoint = read_checkpoint(weights_file)
        *_, last_bias = checkpoint.state.values()
        classes = len(last_bias) if last_bias.ndim else 1
        teacher = torchvision.models.get_model(name, weights=None, num_classes=classes)
        load_strictly(teacher, checkpoint)
        return teacher
    try:
        return torchvision.models.get_model(name, weights="DEFAULT")
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"cannot download the weights of {name} ({error}):"
            " pass --teacher_checkpoint with a file of them"
        ) from error
