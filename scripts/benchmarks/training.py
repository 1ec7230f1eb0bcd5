"""A training step or an evaluation, ours against another side; and what the live measures cost.

    python -m scripts.benchmarks step --compile --channels_last --precision bfloat16 [--split]

Our side takes --precision, --compile and --channels_last; the other one is float32, eager and NCHW:
the network composed from elementary operations (models/reference.py) or, with --against eager, our
own code.  Products of float32 use TF32 on both sides if the precision is not float32.  `measures`
compares our own step without and with the live measures of its signs.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import call
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor

from models import MODELS, build_model
from models.reference import to_reference
from scripts.benchmarks import timing
from scripts.benchmarks.timing import DEVICE, clock, interleaved
from utils.engine import train_one_epoch
from utils.losses import batch_loss
from utils.metrics import BinaryMetrics
from utils.optim import build_optimizer
from utils.precision import PRECISIONS, autocast, compiled, place, set_precision
from utils.run.command_line import Parser
from utils.run.config import FIELDS, Config, parse_config
from utils.run.state import Hook, TrainState

STEP2 = Path(__file__).parents[2] / "step2" / "config.yaml"
TEACHER = "resnet34"
SAVED = "saved for backward, MiB/image"
PEAK = "peak memory, MiB"


def add_options(parser: Parser) -> None:
    timing.add_comparison_options(parser)
    parser.add_argument("--model", choices=MODELS, default="reactnet_a")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--against", choices=("reference", "eager"), default="reference")
    parser.add_argument("--teacher", action="store_const", const=TEACHER, help=f"{TEACHER}, `step`")
    parser.add_argument("--split", action="store_true", help="time the parts of a step as well")
    parser.add_argument("--profile", type=Path, help="write our costliest operations to this file")


def run(what: str, arguments: argparse.Namespace) -> None:
    options = vars(arguments)
    config = step2_config(**{name: options[name] for name in FIELDS if name in options})
    if what == "measures":
        comparison = compare_measures(config, arguments.rounds)
    else:
        names = ("rounds", "against", "split", "profile")
        comparison = compare(what, config, **{name: options[name] for name in names})
    timing.report(comparison, arguments)


def step2_config(image_size: int, **changes) -> Config:
    """The configuration of step 2, from scratch, with some of its fields changed."""
    changes |= {"image_size": image_size, "val_resize": image_size, "latent_init": "symmetric"}
    return replace(parse_config(STEP2, []), **changes)


def compare_measures(config: Config, rounds: int) -> dict:
    """Time a step without and with the live measures, as `compare`."""
    set_precision(config.precision)
    side = Side(config)
    measures = BinaryMetrics(side.model, side.images[:1])
    sides = {"without": side.step, "with": partial(side.step, [measures])}
    return {"seconds": interleaved(sides, rounds), "notes": {}}


def compare(
    what: str,
    config: Config,
    rounds: int,
    against: str = "reference",
    split: bool = False,
    profile: Path | None = None,
) -> dict:
    """Time a "step" or an "evaluation" as `config` says against float32, eager and NCHW.

    Args:
        against: the other side, the "reference" network or our own, "eager".
        split: note the seconds of each part of a step as well.
        profile: file for the operations that our side spends most time in.
    """
    set_precision(config.precision)
    plain = replace(config, precision="float32", compile=False, channels_last=False)
    sides = {against: Side(plain, is_reference=against == "reference"), "ours": Side(config)}
    run = Side.step if what == "step" else Side.evaluate
    runs = {name: partial(run, side) for name, side in sides.items()}
    notes = {}
    if what == "step":
        notes[SAVED] = {name: side.saved_for_backward() for name, side in sides.items()}
    if DEVICE.type == "cuda":
        notes[PEAK] = {name: peak_memory(run) for name, run in runs.items()}
    if profile:
        profile.write_text(costliest_operations(runs["ours"]))
    if split:
        split_steps = {name: side.part_seconds for name, side in sides.items()}
        parts = interleaved(split_steps, rounds, measure=call)
        for part in parts["ours"][0]:
            medians = {name: median(each[part] for each in parts[name]) for name in sides}
            notes[f"{part}, s"] = medians
    return {"seconds": interleaved(runs, rounds), "notes": notes}


class Side:
    """A network, its teacher, its optimizer and a random batch.

    Args:
        is_reference: composed from elementary operations, with Adam unfused.
    """

    def __init__(self, config: Config, is_reference: bool = False):
        torch.manual_seed(0)
        model = build_model(config.model, **config.network_options())
        if is_reference:
            model = to_reference(model)
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

    def part_seconds(self) -> dict[str, float]:
        """Seconds of each part of a step, one after the other."""
        self.model.train()
        self.optimizer.zero_grad()
        ends = {"start": clock()}
        with autocast(DEVICE, self.config.precision):
            if self.teacher is not None:
                with torch.no_grad():
                    self.teacher(self.images)
                ends["teacher"] = clock()
            loss = batch_loss(self.model(self.images), self.images, self.labels, None, 0.0)
        ends["forward"] = clock()
        loss.backward()
        ends["backward"] = clock()
        self.optimizer.step()
        ends["optimizer"] = clock()
        return {part: end - start for (_, start), (part, end) in pairwise(ends.items())}


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
