"""The networks, built by name."""

from torch import nn

from models.bcdnet import BCDNetA
from models.meliusnet import MeliusNet29
from models.reactnet import ReActNetA
from models.resnet import BiRealR18, ReActNetR18, RealToBinaryR18, StrongBaselineR18
from utils.run.errors import UserError

MODELS = {
    "reactnet_a": ReActNetA,
    "reactnet_r18": ReActNetR18,
    "bireal_r18": BiRealR18,
    "strong_baseline_r18": StrongBaselineR18,
    "real_to_binary_r18": RealToBinaryR18,
    "meliusnet29": MeliusNet29,
    "bcdnet_a": BCDNetA,
}


def build_model(name: str, num_classes: int = 1000, **options) -> nn.Module:
    """Build a network of `MODELS` with the options of `models.layers.NetworkOptions`.

    Raises:
        UserError: an unknown name, or a value that the network cannot be built with.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](num_classes, **options)
