"""What the paper measures of a binary network, as pure functions; then the hook that tracks it.

    FF ratio    share of the signs that one update flips
    C2I ratio   share of the signs that are still the initial ones
    saturation  share of |a| > 1 at the input of Sign, where the clip estimator passes no gradient
    CAM, SDAM   mean |w| of each output channel, and its standard deviation over the channels

Signs are boolean, True for +1.  "Latent weights" are those of every `LatentConv2d`: in step 1 they
still act as real weights, and have signs as well.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.binarize import Sign, add_shift, channel_scale, latent_convolutions
from utils.run.errors import UserError

HISTOGRAM_LIMIT = 1.5  # latent weights beyond it count as at it


def ff_ratio(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Flip-flop ratio of one update: sum |Sign(w') - Sign(w)| / 2 / N_total.

    Args:
        before, after: layer name -> signs.
    """
    changed = sum(int(torch.count_nonzero(before[name] != after[name])) for name in before)
    return changed / sum(sign.numel() for sign in before.values())


def c2i_ratio(initial: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> float:
    """Correlation to initialization: 1 - the share of signs that differ from their first ones.

    The authors' slides print a further factor 1/2, with which it could never fall below 0.5, as
    published values do.
    """
    return 1 - ff_ratio(initial, final)


def saturation(x: Tensor) -> float:
    """Share of |x| > 1 at the input of Sign (paper, Fig. 3)."""
    return (x.abs() > 1).double().mean().item()


def channel_absolute_mean(weight: Tensor) -> Tensor:
    """CAM: mean |w| over each output kernel, (O, I, kH, kW) -> (O,).  Of an update: update CAM."""
    return channel_scale(weight).flatten()


def sdam(weight: Tensor) -> float:
    """SDAM: standard deviation of CAM over the output channels (of the whole set, not a sample)."""
    return channel_absolute_mean(weight).std(correction=0).item()


def histogram(x: Tensor, bins: int = 60, limit: float = HISTOGRAM_LIMIT) -> Tensor:
    """Counts of values in `bins` equal bins over [-limit, limit]; those outside go to the ends."""
    return torch.histc(x.float().clamp(-limit, limit), bins, -limit, limit).long()


def latent_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> latent weights (O, I, kH, kW), in the order of definition.

    Raises:
        UserError: the model has none.
    """
    layers = latent_convolutions(model)
    if not layers:
        raise UserError(f"this {type(model).__name__} has no layers with latent weights")
    return {name: layer.weight.detach() for name, layer in layers.items()}


def signs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer name -> whether each weight's Sign is +1, same shapes."""
    return {name: weight >= 0 for name, weight in weights.items()}


@torch.no_grad()
def at_signs(model: nn.Module, images: Tensor, measure: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Name of each Sign layer, in order of execution -> `measure` of its input, in eval mode.

    Args:
        images: (N, 3, H, W).

    Raises:
        UserError: the model has no Sign.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, Sign)}
    if not names:
        raise UserError(f"this {type(model).__name__} has no binary activations")
    measured: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, model.training)
        for module in names:
            hook = module.register_forward_pre_hook(
                lambda m, inputs: measured.update({names[m]: measure(add_shift(*inputs))})
            )
            stack.callback(hook.remove)
        model.eval()(images)
    return measured


class Meter:
    """Loss, top-1 and top-5 over the images seen, summed on the device without waiting for it.

    Args:
        state: of an earlier `state_dict`, whose sums and time go on.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        self.sums = state["sums"] if state else torch.zeros(5, dtype=torch.float64)
        self.started = time.perf_counter() - (state["seconds"] if state else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """sums (5,) of this process, and seconds since the start."""
        return {"sums": self.sums.cpu(), "seconds": time.perf_counter() - self.started}

    @torch.no_grad()
    def update(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its (n,) losses or their mean, (n, classes) logits and (n,) labels."""
        self.sums = self.sums.to(labels.device)
        losses = losses.double().expand(len(labels))
        best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
        hits = best == labels[:, None]
        self.sums[0] += losses.sum()
        self.sums[1] += losses.square().sum()
        self.sums[2] += hits[:, 0].sum()
        self.sums[3] += hits.sum()
        self.sums[4] += len(labels)

    def results(self) -> dict[str, float]:
        """loss (mean), top1 and top5 (percent), images, images_per_second."""
        loss, _, top1, top5, images = self.sums.tolist()
        return {
            "loss": loss / images,
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "images": int(images),
            "images_per_second": images / (time.perf_counter() - self.started),
        }

    def loss_deviation(self) -> float:
        """Standard deviation of the losses of single images."""
        loss, squares, *_, images = self.sums.tolist()
        return math.sqrt(max(squares / images - (loss / images) ** 2, 0.0))


class BinaryMetrics:
    """Follows the signs of a model's latent weights from one update to the next.

    Weights are the same on every process, so rank 0 alone keeps count.

    Args:
        model: on its device, with the weights the run starts from.
        images: a fixed batch for saturation, (N, 3, H, W) on the same device.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.model = model
        self.images = images
        self.set_initial_signs()

    def set_initial_signs(self) -> None:
        """Let C2I compare with the signs that the weights have now."""
        self.initial = self.previous = signs(latent_weights(self.model))
        self._reset()

    def _reset(self) -> None:
        self.iterations = 0
        self.flips = {
            name: torch.zeros((), dtype=torch.int64, device=self.images.device)
            for name in self.previous
        }

    @torch.no_grad()
    def on_step_end(self, state: Any) -> None:
        """Count the signs that the last update flipped; nothing waits for the device."""
        now = signs(latent_weights(self.model))
        for name, sign in now.items():
            self.flips[name] += torch.count_nonzero(sign != self.previous[name])
        self.previous = now
        self.iterations += 1

    def on_epoch_end(self, state: Any) -> None:
        self._reset()

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """The measures of the epoch so far, JSON-able.

        ff_ratio is the mean over the epoch's iterations, c2i_ratio is against the initial signs;
        `layers` holds both for each layer, with the smallest CAM, SDAM and the latent histogram,
        `saturation` the share of |x| > 1 at each Sign.
        """
        weights = latent_weights(self.model)
        steps = max(self.iterations, 1)
        layers = {}
        for name, weight in weights.items():
            initial, now = ({name: sign[name]} for sign in (self.initial, self.previous))
            layers[name] = {
                "ff_ratio": self.flips[name].item() / weight.numel() / steps,
                "c2i_ratio": c2i_ratio(initial, now),
                "smallest_cam": channel_absolute_mean(weight).min().item(),
                "sdam": sdam(weight),
                "latent_histogram": histogram(weight).tolist(),
            }
        flips = sum(flips.item() for flips in self.flips.values())
        total = sum(weight.numel() for weight in weights.values())
        summary = {
            "ff_ratio": flips / total / steps,
            "c2i_ratio": c2i_ratio(self.initial, self.previous),
            "layers": layers,
        }
        if any(isinstance(module, Sign) for module in self.model.modules()):
            summary["saturation"] = at_signs(self.model, self.images, saturation)
        return summary

    def state_dict(self) -> dict[str, Any]:
        """The initial signs, 1 bit each, and the flips since the epoch began.

        The signs to compare the next step with are those of the weights saved beside it.
        """
        return {
            "initial_signs": {name: pack_signs(sign.cpu()) for name, sign in self.initial.items()},
            "iterations": self.iterations,
            "flips": {name: flips.cpu() for name, flips in self.flips.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a `state_dict`, or anew without one, with the weights that the model has."""
        self.set_initial_signs()
        if not state:
            return
        self.initial = {
            name: unpack_signs(state["initial_signs"][name], sign.shape).to(sign.device)
            for name, sign in self.previous.items()
        }
        self.iterations = state["iterations"]
        for name, flips in state["flips"].items():
            self.flips[name] += flips.to(self.images.device)


class NoMetrics:
    """Stands in for `BinaryMetrics` where nothing is measured."""

    def _nothing(self, *_) -> None:
        pass

    set_initial_signs = on_step_end = on_epoch_end = state_dict = load_state_dict = _nothing

    def summary(self) -> dict[str, Any]:
        return {}


FIXED_IMAGES = 32  # on which saturation is measured


def build_metrics(config, dist, model: nn.Module, images) -> BinaryMetrics | NoMetrics:
    """What rank 0 measures of a network with binary layers, unless it is switched off.

    Args:
        config: its `live_measures`, `binary_activations` and `binary_weights`.
        images: the validation set, some of which are the fixed batch for saturation.
    """
    is_binary = config.binary_activations or config.binary_weights
    if not (config.live_measures and dist.is_rank0 and is_binary):
        return NoMetrics()
    fixed, _ = images.batch(images.evenly_spaced(FIXED_IMAGES))
    return BinaryMetrics(model, fixed.to(dist.device))


def pack_signs(signs: Tensor) -> Tensor:
    """Booleans of any shape, n values -> ceil(n / 8) bytes, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(signs.flatten(), bitorder="little"))


def unpack_signs(packed: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """Bytes of `pack_signs` -> booleans in `shape`."""
    bits = np.unpackbits(packed, count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).bool().view(*shape)
