"""Build the network that a checkpoint was trained with."""

from pathlib import Path

from torch import nn

from models import build_model
from utils.checkpoint import load_strictly, read_checkpoint
from utils.config import from_saved


def network_from_checkpoint(path: Path) -> nn.Module:
    """The network of a checkpoint written by this repo, with its weights.

    Raises:
        InputError: the file cannot be read, or carries no configuration to build from.
    """
    checkpoint = read_checkpoint(path)
    config = from_saved(checkpoint.content.get("config"), path)
    classes = len(checkpoint.state["fc.bias"])
    model = build_model(config.model, num_classes=classes, **config.network_options())
    load_strictly(model, checkpoint)
    return model
