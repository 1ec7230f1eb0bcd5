"""The network whose softmax is the student's target."""

from pathlib import Path

import torch
import torchvision
from torch import nn

from models.checkpoints import load_network
from utils.checkpoint.checkpoint import load_strictly, read_checkpoint
from utils.engine import count_outputs
from utils.precision import compiled, place
from utils.run.command_line import printable
from utils.run.config import Config
from utils.run.errors import UserError, is_out_of_memory


def load_teacher(config: Config, num_classes: int, device: torch.device) -> nn.Module | None:
    """The teacher in eval mode and without gradients, or None where labels are the target.

    Args:
        config: its `teacher`, a torchvision network (whose pretrained weights are downloaded, or
            read from `teacher_checkpoint`), the path of a checkpoint trained here, or None.
        num_classes: of the data; the teacher must have as many.

    Raises:
        UserError: unknown name, no download, a file, class count or image size that does not fit.
    """
    name = config.teacher
    if name is None:
        return None
    # The weights it is built with are replaced; drawing them must not move the run's generator.
    with torch.random.fork_rng(devices=[]):
        teacher = _build(name, config.teacher_checkpoint)
    teacher = place(teacher.eval().requires_grad_(False), config, device)
    try:
        outputs = count_outputs(teacher, config.image_size, device)
    except (AssertionError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = printable(str(error).partition("\n")[0])
        raise UserError(
            f"the teacher {name} cannot compute images of {config.image_size} pixels ({reason}):"
            " pass another --image_size or another --teacher"
        ) from error
    if outputs != num_classes:
        raise UserError(
            f"the teacher {name} has {outputs} classes and the data {num_classes}:"
            " pass a --teacher trained on this data, or --teacher none to train on labels"
        )
    return compiled(teacher, config)


def _build(name: str, weights_file: str | None) -> nn.Module:
    if name not in torchvision.models.list_models(torchvision.models):
        if Path(name).exists():
            return load_network(name).model
        raise UserError(
            f"teacher {name!r} is neither a torchvision network, nor a checkpoint file, nor none"
        )
    if weights_file:
        checkpoint = read_checkpoint(weights_file)
        *_, last_bias = checkpoint.state.values()
        classes = len(last_bias) if last_bias.ndim else 1
        teacher = torchvision.models.get_model(name, weights=None, num_classes=classes)
        load_strictly(teacher, checkpoint)
        return teacher
    try:
        return torchvision.models.get_model(name, weights="DEFAULT")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the weights of {name} ({error}):"
            " pass --teacher_checkpoint with a file of them"
        ) from error
