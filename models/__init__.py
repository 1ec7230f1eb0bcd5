"""The networks, built by name."""

from torch import nn

from models.reactnet import ReActNetA
from models.resnet import BiRealR18, ReActNetR18, StrongBaselineR18
from utils.run.errors import UserError

MODELS = {
    "reactnet_a": ReActNetA,
    "reactnet_r18": ReActNetR18,
    "bireal_r18": BiRealR18,
    "strong_baseline_r18": StrongBaselineR18,
}


def build_model(name: str, **options) -> nn.Module:
    """Build a network of `MODELS` with its constructor's options.

    Raises:
        UserError: the name is not known (the message lists those that are).
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](**options)
