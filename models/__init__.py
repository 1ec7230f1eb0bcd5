"""The networks, built by name."""

from torch import nn

from models.reactnet import ReActNetA
from utils.errors import InputError

MODELS = {"reactnet_a": ReActNetA}


def build_model(name: str, **options) -> nn.Module:
    """Build a network of `MODELS` with its constructor's options.

    Raises:
        InputError: the name is not known (the message lists those that are).
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](**options)
