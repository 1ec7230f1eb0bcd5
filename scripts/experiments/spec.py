"""Experiments as data: a YAML file lists runs as overrides of the two steps, at several scales.

    title, claim    for the reader: what it shows, and what the paper concludes from it
    measure         how the runs become rows of the CSV (see scripts/run_experiment.py)
    runs            name -> step (1 or 2), after (a run above, whose best checkpoint it starts
                    from), scales (the only ones it belongs to), and options of that step; an
                    option may be one value for each scale
    published       the paper's rows of the same CSV
    settings        what the measure itself needs, also by scale

A scale is a YAML file of options that all runs share: the data, the network's size, the length.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.checkpoint.checkpoint import BEST
from utils.run.config import Config, parse_config
from utils.run.errors import UserError
from utils.run.logging import RECORDS, read_records

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "scripts" / "experiments"
_RUN_KEYS = {"step", "after", "scales"}
_KEYS = {"title", "claim", "measure", "runs", "published", "settings"}


@dataclass(frozen=True)
class Experiment:
    """One table or figure."""

    name: str
    measure: str
    runs: Mapping[str, Mapping[str, Any]]
    published: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: a step with all its options resolved."""

    name: str
    seed: int
    step: int
    arguments: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.save)

    @property
    def program(self) -> Path:
        return ROOT / f"step{self.step}" / "train.py"

    def is_finished(self) -> bool:
        """Its last epoch has been recorded."""
        return (self.folder / RECORDS).exists() and len(self.records()) == self.config.epochs

    def records(self) -> list[dict[str, Any]]:
        """One record per epoch."""
        return read_records(self.folder)


def experiment_names() -> list[str]:
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def scale_names() -> list[str]:
    return sorted(path.stem for path in (EXPERIMENTS / "scales").glob("*.yaml"))


def read_experiment(name: str, scale: str) -> Experiment:
    """The experiment called `name`, with the values that belong to `scale`.

    Raises:
        UserError: no such experiment; names those there are.
    """
    if name not in experiment_names():
        raise UserError(f"unknown experiment {name!r}: there are {', '.join(experiment_names())}")
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    if unknown := set(content) - _KEYS:
        raise UserError(f"experiment {name} has the unknown key {min(unknown)}")
    return Experiment(
        name,
        content["measure"],
        {
            run: _at_scale(options, scale)
            for run, options in content.get("runs", {}).items()
            if scale in options.get("scales", [scale])
        },
        content.get("published", []),
        _at_scale(content.get("settings", {}), scale),
    )


def _at_scale(options: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """Options whose value is a mapping with `scale` among its keys take the value found there."""
    return {
        name: value[scale] if isinstance(value, dict) and scale in value else value
        for name, value in options.items()
    }


def resolve_runs(
    experiment: Experiment, scale: str, seeds: int, out: Path, options: Sequence[str]
) -> list[Run]:
    """All runs with all seeds, each after those it starts from.

    A run's folder in `out` ends in a digest of everything that decides its result, so that
    experiments share runs, and none is taken for another.

    Args:
        options: of the command line, for every run.

    Raises:
        UserError: an option that is unknown or out of range.
    """
    found: dict[tuple[str, int], Run] = {}
    for seed in range(seeds):
        for name, overrides in experiment.runs.items():
            parent = found[overrides["after"], seed] if "after" in overrides else None
            run = _resolve(name, seed, overrides, parent, scale, out, options)
            found[name, seed] = run
    return list(found.values())


def _resolve(
    name: str,
    seed: int,
    overrides: Mapping[str, Any],
    parent: Run | None,
    scale: str,
    out: Path,
    options: Sequence[str],
) -> Run:
    step = overrides["step"]
    own = {key: value for key, value in overrides.items() if key not in _RUN_KEYS}
    start = str(parent.folder / BEST) if parent else "none"
    arguments = [
        *("--config", str(EXPERIMENTS / "scales" / f"{scale}.yaml")),
        *(text for key, value in own.items() for text in (f"--{key}", _as_argument(value))),
        *options,
        *("--seed", str(seed), "--init_from", start),
    ]
    default = ROOT / f"step{step}" / "config.yaml"
    config = parse_config(default, arguments)
    folder = _folder(out, name, seed, _digest(config, step, parent))
    arguments += ["--save", str(folder)]
    return Run(name, seed, step, tuple(arguments), dataclasses.replace(config, save=str(folder)))


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(config: Config, step: int, parent: Run | None) -> str:
    # Defaults are left out, so that an option added later changes no digest.
    deciding = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if (not f.metadata.get("place") or f.name in ("data", "val_dir", "keep_epochs"))
        and getattr(config, f.name) != f.default
    }
    start = parent.folder.name.rpartition("-")[2] if parent else None
    text = json.dumps([step, start, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _folder(out: Path, name: str, seed: int, digest: str) -> Path:
    """The folder of an earlier run with this digest, whatever its experiment called it."""
    there = sorted(out.glob(f"*-{digest}"))
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return there[0] if there else out / f"{slug}-seed{seed}-{digest}"
