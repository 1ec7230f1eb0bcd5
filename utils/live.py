"""The paper's measures, collected while a network trains and given out once an epoch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils import measures
from utils.binarize import Sign
from utils.config import Config
from utils.data import SeededImages
from utils.distributed import Process
from utils.packing import pack_bits, unpack_bits

FIXED_IMAGES = 32  # on which saturation is measured


class LiveMeasures:
    """Follows the signs of a model's latent weights from one optimizer step to the next.

    Weights are the same on every process, so the main one alone keeps count.

    Args:
        model: with the weights the run starts or goes on from, on its device.
        images: a fixed batch for saturation, (N, 3, H, W) on the same device.
        state: of an earlier `state_dict`, whose counts go on; C2I is against its initial signs.
    """

    def __init__(self, model: nn.Module, images: Tensor, state: Mapping[str, Any] | None = None):
        self.model = model
        self.images = images
        self.previous = measures.signs(measures.latent_weights(model))
        self.initial = _unpacked(state["initial_signs"], self.previous) if state else self.previous
        self._reset()
        if state and "flips" in state:
            self.iterations = state["iterations"]
            for name, flips in state["flips"].items():
                self.flips[name] += flips.to(images.device)

    def _reset(self) -> None:
        device = self.images.device
        self.iterations = 0
        self.flips = {
            name: torch.zeros((), dtype=torch.int64, device=device) for name in self.previous
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the signs that the last update flipped; nothing waits for the device."""
        now = measures.signs(measures.latent_weights(self.model))
        for name, sign in now.items():
            self.flips[name] += torch.count_nonzero(sign != self.previous[name])
        self.previous = now
        self.iterations += 1

    @torch.no_grad()
    def epoch(self) -> dict[str, Any]:
        """The measures of the epoch so far, JSON-able; the flip count starts again.

        ff_ratio is the mean over the epoch's iterations, c2i_ratio is against the run's start;
        `layers` holds both for each layer, with the smallest CAM, SDAM and the latent histogram,
        `saturation` the share of |x| > 1 at each Sign.
        """
        weights = measures.latent_weights(self.model)
        steps = max(self.iterations, 1)
        layers = {}
        for name, weight in weights.items():
            initial, now = ({name: sign[name]} for sign in (self.initial, self.previous))
            layers[name] = {
                "ff_ratio": self.flips[name].item() / weight.numel() / steps,
                "c2i_ratio": measures.c2i_ratio(initial, now),
                "smallest_cam": measures.channel_absolute_mean(weight).min().item(),
                "sdam": measures.deviation_of_absolute_means(weight),
                "latent_histogram": measures.histogram(weight).tolist(),
            }
        flips = sum(flips.item() for flips in self.flips.values())
        total = sum(weight.numel() for weight in weights.values())
        found = {
            "ff_ratio": flips / total / steps,
            "c2i_ratio": measures.c2i_ratio(self.initial, self.previous),
            "layers": layers,
        }
        if any(isinstance(module, Sign) for module in self.model.modules()):
            found["saturation"] = measures.saturation_by_layer(self.model, self.images)
        self._reset()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The initial signs, 1 bit each, and the flips since the epoch began.

        The signs to compare the next step with are those of the weights saved beside it.
        """
        return {
            "initial_signs": {name: pack_bits(sign.cpu()) for name, sign in self.initial.items()},
            "iterations": self.iterations,
            "flips": {name: flips.cpu() for name, flips in self.flips.items()},
        }


class NoMeasures:
    """Stands in where nothing is measured."""

    def after_step(self) -> None:
        pass

    def epoch(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> None:
        return None


def live_measures(
    config: Config,
    process: Process,
    model: nn.Module,
    images: SeededImages,
    state: Mapping[str, Any] | None,
) -> LiveMeasures | NoMeasures:
    """What the main process measures of a network with binary layers, unless it is switched off."""
    is_binary = config.binary_activations or config.binary_weights
    if not (config.live_measures and process.is_main and is_binary):
        return NoMeasures()
    fixed, _ = images.batch(range(min(FIXED_IMAGES, len(images))))
    return LiveMeasures(model, fixed.to(process.device), state)


def _unpacked(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (unpack_bits(packed[name], list(sign.shape)) > 0).to(sign.device)
        for name, sign in like.items()
    }
