"""Experiments as data: a YAML file lists runs as overrides of the two steps, at several scales.

    title, claim    for the reader: what it shows, and what the paper concludes from it
    look            what to see in the picture
    claims          what `verdicts` decides from its CSV
    measure         how the runs become rows of the CSV, a key of `measures.MEASURES`
    runs            name -> step (1 or 2) and options of that step, each one value or a value for
                    some scales, of which the others leave it out; or the name of the experiment
                    that has the same runs.  Further keys:
                        like      names in variants.yaml, whose options it has as well
                        after     a run above, whose best checkpoint it starts from
                        teacher   a run above, whose best checkpoint teaches it, or the option
                        length    times as many epochs as the scale has
                        seeds     at most so many of the seeds asked for
                        scales    the only ones it belongs to
    published       the paper's rows of the same CSV
    settings        what the measure itself needs, also by scale

A scale is a YAML file of options that all runs share: the data, the network's size, the length.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from utils.checkpoint.checkpoint import BEST
from utils.run.config import Config, parse_config
from utils.run.errors import UserError
from utils.run.logging import RECORDS, read_records

EXPERIMENTS = Path(__file__).resolve().parent
VARIANTS = EXPERIMENTS / "variants.yaml"
ROOT = EXPERIMENTS.parents[1]
SCALES = sorted(path.stem for path in (EXPERIMENTS / "scales").glob("*.yaml"))
_RUN_KEYS = {"step", "like", "after", "length", "seeds", "scales"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure, at one scale: the keys of its file."""

    title: str
    claim: str = ""
    look: str = ""
    claims: Sequence[Mapping[str, Any]] = ()
    measure: str
    runs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training: a step with all its options resolved."""

    name: str
    seed: int
    step: int
    config: Config
    arguments: Sequence[str]
    folder: Path
    parents: "Sequence[Run]"  # whose best checkpoints it starts from or learns from

    @property
    def digest(self) -> str:
        return self.folder.name.rpartition("-")[2]

    def records(self) -> list[dict[str, Any]]:
        """One record per epoch so far."""
        return read_records(self.folder) if (self.folder / RECORDS).exists() else []

    def is_finished(self) -> bool:
        """Whether its last epoch has been recorded."""
        return len(self.records()) == self.config.epochs

    def descends_from(self, other: "Run") -> bool:
        return any(p.folder == other.folder or p.descends_from(other) for p in self.parents)


def experiment_names() -> list[str]:
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem != VARIANTS.stem)


def read_experiment(name: str, scale: str) -> Experiment:
    """The experiment called `name`, with the values that belong to `scale`.

    Raises:
        UserError: no such experiment, or an unknown key in its file.
    """
    if name not in experiment_names():
        raise UserError(f"unknown experiment {name!r}: there are {', '.join(experiment_names())}")
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    if unknown := content.keys() - {key.name for key in fields(Experiment)}:
        raise UserError(f"experiment {name} has the unknown key {min(unknown)}")
    variants = yaml.safe_load(VARIANTS.read_text())
    runs = content.get("runs", {})
    if isinstance(runs, str):
        runs = yaml.safe_load((EXPERIMENTS / f"{runs}.yaml").read_text())["runs"]
    content["runs"] = {}
    for run, own in runs.items():
        if scale in own.get("scales", [scale]):
            options: dict[str, Any] = {}
            for variant in own.get("like", []):
                options |= variants[variant]
            content["runs"][run] = _at_scale(options | own, scale)
    content["settings"] = _at_scale(content.get("settings", {}), scale)
    return Experiment(**content)


def _at_scale(options: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """The options, with the value for `scale` of those that have one for single scales."""
    at_scale = {}
    for name, value in options.items():
        if not (isinstance(value, dict) and value.keys() <= {*SCALES}):
            at_scale[name] = value
        elif scale in value:
            at_scale[name] = value[scale]
    return at_scale


def resolve_runs(
    experiment: Experiment, scale: str, seeds: Sequence[int], out: Path, options: Sequence[str]
) -> list[Run]:
    """All runs with all seeds, each after those it starts or learns from.

    A run's folder in `out` ends in a digest of everything that decides its result, so that
    experiments share runs of the same settings and no others.

    Args:
        options: of the command line, for every run.

    Raises:
        UserError: an option that is unknown or out of range, or that a run itself sets.
    """
    given = {text.partition("=")[0].removeprefix("--") for text in options if text[:2] == "--"}
    runs: dict[tuple[str, int], Run] = {}
    for place, seed in enumerate(seeds):
        for name, own in experiment.runs.items():
            if place >= own.get("seeds", len(seeds)):
                continue
            if fixed := given & {*own, "config", "seed", "init_from", "save"}:
                raise UserError(
                    f"--{min(fixed)} is set by the experiment, in run {name!r}: leave it out"
                )
            start = runs[own["after"], seed] if "after" in own else None
            teacher = None
            if own.get("teacher") in experiment.runs:
                teacher = runs.get((own["teacher"], seed), runs[own["teacher"], seeds[0]])
                own = {**own, "teacher": str(teacher.folder / BEST)}
            arguments = ["--config", str(EXPERIMENTS / "scales" / f"{scale}.yaml")]
            for option, value in own.items():
                if option not in _RUN_KEYS:
                    text = value if isinstance(value, str) else json.dumps(value)
                    arguments += [f"--{option}", text]
            init_from = str(start.folder / BEST) if start else "none"
            arguments += [*options, "--seed", str(seed), "--init_from", init_from]
            defaults = ROOT / f"step{own['step']}" / "config.yaml"
            config = parse_config(defaults, arguments)
            if "length" in own:
                arguments += ["--epochs", str(round(config.epochs * own["length"]))]
                config = parse_config(defaults, arguments)
            digest = _digest(config, own["step"], start, teacher)
            slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
            # A run of another experiment may have this digest under another name.
            folder, *_ = *sorted(out.glob(f"*-{digest}")), out / f"{slug}-seed{seed}-{digest}"
            arguments += ["--save", str(folder)]
            config = replace(config, save=str(folder))
            parents = [run for run in (start, teacher) if run]
            runs[name, seed] = Run(name, seed, own["step"], config, arguments, folder, parents)
    return list(runs.values())


def _digest(config: Config, step: int, start: Run | None, teacher: Run | None) -> str:
    # Defaults are left out, so that an option added later changes no digest.
    deciding = {
        option.name: getattr(config, option.name)
        for option in fields(config)
        if (not option.metadata.get("place") or option.name in ("data", "val_dir", "keep_epochs"))
        and getattr(config, option.name) != option.default
    }
    if teacher:  # whose place is not what decides
        deciding["teacher"] = teacher.digest
    text = json.dumps([step, start and start.digest, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
