"""A training step or an evaluation: our side as configured, and what it is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from models import build_model
from models.reference import to_reference
from scripts.benchmarks.timing import DEVICE, interleaved
from utils.engine import train_one_epoch
from utils.metrics import BinaryMetrics
from utils.optim import build_optimizer
from utils.precision import autocast, compiled, place, set_precision
from utils.run.config import Config, parse_config
from utils.run.state import Hook, TrainState

STEP2 = Path(__file__).parents[2] / "step2" / "config.yaml"
TEACHER = "resnet34"
SAVED = "saved for backward, MiB/image"
PEAK = "peak memory, MiB"


def step2_config(image_size: int, **changes) -> Config:
    """The configuration of step 2, from scratch, with some of its fields changed."""
    changes |= {"image_size": image_size, "val_resize": image_size, "latent_init": "symmetric"}
    return replace(parse_config(STEP2, []), **changes)


def compare(what: str, config: Config, rounds: int, profile: Path | None) -> dict:
    """Time a "step" or an "evaluation" of both sides, or our step without and with "measures".

    Args:
        config: of our side; its products of float32 use TF32 unless its precision is float32, and
            so do the reference's.
        profile: file for the operations that our step spends most time in.

    Returns:
        `seconds`, side -> rounds, and `notes`, measure -> side -> value.
    """
    set_precision(config.precision)
    ours, notes = Side(config), {}
    if what == "measures":
        measures = [BinaryMetrics(ours.model, ours.images[:1])]
        runs = {"without": ours.step, "with": partial(ours.step, measures)}
        return {"seconds": interleaved(runs, rounds), "notes": notes}
    reference = Side(config, is_reference=True)
    runs = {"reference": reference.evaluate, "ours": ours.evaluate}
    if what == "step":
        runs = {"reference": reference.step, "ours": ours.step}
        sides = {"reference": reference, "ours": ours}
        notes[SAVED] = {name: side.saved_for_backward() for name, side in sides.items()}
        if DEVICE.type == "cuda":
            notes[PEAK] = {name: peak_memory(run) for name, run in runs.items()}
        if profile:
            profile.write_text(costliest_operations(ours.step))
    return {"seconds": interleaved(runs, rounds), "notes": notes}


class Side:
    """A network, its teacher, its optimizer and a random batch.

    Args:
        is_reference: composed from elementary operations, float32, eager, NCHW, Adam unfused.
    """

    def __init__(self, config: Config, is_reference: bool = False):
        torch.manual_seed(0)
        model = build_model(config.model, **config.network_options())
        if is_reference:
            model = to_reference(model)
            config = replace(config, precision="float32", compile=False, channels_last=False)
            config = replace(config, optimizer_options={"fused": False})
        self.config = config
        self.optimizer = build_optimizer(place(model, config, DEVICE), config)
        self.model = compiled(model, config)
        self.teacher = None
        if config.teacher:  # its weights are random: they do not change the time
            teacher = torchvision.models.get_model(config.teacher).eval().requires_grad_(False)
            self.teacher = compiled(place(teacher, config, DEVICE), config)
        shape = config.batch_size, 3, config.image_size, config.image_size
        self.images = torch.randn(shape, device=DEVICE)
        self.labels = torch.randint(1000, (config.batch_size,), device=DEVICE)

    def step(self, hooks: Sequence[Hook] = ()) -> None:
        batches = [(self.images, self.labels)]
        state = TrainState(hooks=hooks)
        train_one_epoch(self.model, self.teacher, batches, self.optimizer, self.config, state)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        with autocast(DEVICE, self.config.precision):
            self.model(self.images)

    def saved_for_backward(self) -> float:
        """MiB per image that a forward pass saves for the backward pass, parameters apart."""
        storages = {}  # by address; they stay alive, so that no address is used twice

        def remember(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        self.model.train()
        hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
        with hooks, autocast(DEVICE, self.config.precision):
            self.model(self.images)
        for parameter in self.model.parameters():
            storages.pop(parameter.data_ptr(), None)
        return sum(s.nbytes() for s in storages.values()) / len(self.images) / 2**20


def peak_memory(run: Callable[[], None]) -> float:
    """MiB on the GPU at most in a warm run, the weights of both sides included."""
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def costliest_operations(run: Callable[[], None]) -> str:
    """The 20 operations that a warm run spends most time in, as a table."""
    run()
    run()
    with torch.profiler.profile() as profiler:
        run()
    order = f"self_{DEVICE.type}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=80)
