"""Build the network that a checkpoint holds: from its configuration, or inferred from its keys."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import MODELS, build_model
from models.layers import ChannelScale
from utils.binarize import has_exact_weights, is_binary
from utils.checkpoint.checkpoint import Checkpoint, load_strictly, read_checkpoint, with_4d_kernels
from utils.run.config import Config, checked, from_saved
from utils.run.errors import UserError


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in eval mode with the weights of a checkpoint, and its name and options."""

    model: nn.Module
    name: str
    num_classes: int
    options: Mapping[str, Any]
    checkpoint: Checkpoint
    config: Config | None
    image_size: int  # pixels it was trained with
    val_resize: int  # shorter side of validation images before the central crop

    @property
    def has_exact_weights(self) -> bool:
        """Every binary kernel is stored as exactly -1 and +1, not as latent weights."""
        return has_exact_weights(self.model)

    def __str__(self) -> str:
        weights = "latent" if self.options["binary_weights"] else "real"
        if self.has_exact_weights:
            weights = "exact +-1"
        activations = "binary" if self.options["binary_activations"] else "real"
        small = ", small images" if self.options["small_images"] else ""
        return (
            f"{self.name} (width {self.options['width']:g}{small}, {self.num_classes} classes,"
            f" {activations} activations, {weights} weights) from {self.checkpoint}"
        )


def load_network(
    path: Path | str, defaults: Mapping[str, Any] | None = None, **given: Any
) -> LoadedNetwork:
    """Read a checkpoint of any layout and load it strictly into the network it belongs to.

    Args:
        path: a checkpoint of this repo, a released one (also the older one with flat kernels), a
            bare state dict, or a packed file.
        defaults: options of the network to assume where neither the file nor `given` has them.
        given: options of the network that the caller knows, `binary_weights` above all; None
            leaves an option open.  A file written by this repo needs none.

    Raises:
        UserError: unreadable, of no known architecture, or silent on whether its weights are
            real (step 1) or latent ones of a binary network (step 2), whose layouts are the same.
    """
    checkpoint = read_checkpoint(path)
    content, state, source = checkpoint.content, checkpoint.state, checkpoint.path
    given = {name: value for name, value in given.items() if value is not None}
    config = from_saved(content["config"], source) if content.get("config") else None
    if "network" in content:
        name, options = _saved_network(content["network"], source)
    elif config:
        name, options = config.model, config.network_options()
    else:
        name, options = infer_architecture(state, source)
        assumed = {"binary_activations": True, "small_images": False, **(defaults or {})}
        options = {**assumed, **given, **options}
        if "binary_weights" not in options:
            raise UserError(
                f"{source} holds {name}, and its layout does not tell step 1 from step 2:"
                " pass --binary_weights false if its weights are real (step 1), else true;"
                " for use as --teacher, convert a step 2 file to packed first (scripts/convert.py)"
            )
    for option, value in given.items():
        if options.get(option, value) != value:
            raise UserError(
                f"{source} was trained with {option} {options[option]}, not {value}:"
                f" leave --{option} out"
            )
    num_classes = len(state.get("fc.bias", ())) or 1000
    model = build_model(name, num_classes, **options)
    for key, layer in model.named_modules():
        # Only a file of exact weights holds it.
        if isinstance(layer, ChannelScale) and f"{key}.channel" in state:
            layer.channel = torch.ones(layer.channels, 1, 1)
    load_strictly(model, checkpoint)
    sizes = (config.image_size, config.val_resize) if config else (224, 256)  # as released
    return LoadedNetwork(model.eval(), name, num_classes, options, checkpoint, config, *sizes)


def inference_content(loaded: LoadedNetwork) -> dict[str, Any]:
    """What a converted file holds besides its weights: enough to load and evaluate it."""
    return {
        "epoch": loaded.checkpoint.epoch,
        "best_top1_acc": loaded.checkpoint.top1,
        "network": {"model": loaded.name, **loaded.options},
        "config": asdict(loaded.config) if loaded.config else None,
    }


def _saved_network(network: Any, source: Path) -> tuple[str, dict[str, Any]]:
    """Name and options as `inference_content` wrote them, checked like a configuration."""
    names = {"model", "binary_activations", "binary_weights", "width", "small_images"}
    if not isinstance(network, dict) or not names <= network.keys():
        raise UserError(f"{source} does not tell its network as this repo does: convert it again")
    options = checked(network, Path.cwd())
    return options.pop("model"), options


def infer_architecture(state: Mapping[str, Tensor], source: Path) -> tuple[str, dict[str, Any]]:
    """The network whose keys a state dict has, and the options that its tensors imply.

    Raises:
        UserError: no network has these keys; names the closest and what does not fit.
    """
    differences = {}
    for name in MODELS:
        with torch.device("meta"):
            own = build_model(name).state_dict()
        fitted = with_4d_kernels(state, own, by_size=False)
        missing = [key for key in own if key not in fitted]
        left_over = [key for key in fitted if key not in own]
        if not missing and not left_over:
            stem = next(iter(own))
            width = len(fitted[stem]) / len(own[stem])
            options = {"width": width}
            # Only step 2 was ever stored flat, and only binary kernels are exactly -1 and +1.
            kernels = [value for key, value in fitted.items() if "binary" in key]
            is_flat = any(key.endswith(".weights") for key in state)
            if is_flat or (kernels and all(map(is_binary, kernels))):
                options["binary_weights"] = True
            return name, options
        differences[name] = missing, left_over
    closest = min(differences, key=lambda name: sum(map(len, differences[name])))
    missing, left_over = differences[closest]
    raise UserError(
        f"{source} holds none of {', '.join(MODELS)}; closest is {closest}, of whose tensors it"
        f" lacks {len(missing)} ({', '.join(missing[:3]) or 'none'})"
        f" and has {len(left_over)} left over ({', '.join(left_over[:3]) or 'none'})"
    )
