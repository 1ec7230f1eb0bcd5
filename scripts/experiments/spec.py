"""Experiments as data: a YAML file lists runs as overrides of the two steps, at several scales.

    title, claim    for the reader: what it shows, and what the paper concludes from it
    measure         how the runs become rows of the CSV, a key of `measures.MEASURES`
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

EXPERIMENTS = Path(__file__).resolve().parent
ROOT = EXPERIMENTS.parents[1]
SCALES = sorted(path.stem for path in (EXPERIMENTS / "scales").glob("*.yaml"))
_RUN_KEYS = {"step", "after", "scales"}
_KEYS = {"title", "claim", "measure", "runs", "published", "settings"}


@dataclass(frozen=True)
class Experiment:
    """One table or figure."""

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
    config: Config
    arguments: Sequence[str]
    folder: Path
    parent: "Run | None"  # whose best checkpoint it starts from

    def is_finished(self) -> bool:
        """Whether its last epoch has been recorded."""
        return (self.folder / RECORDS).exists() and len(self.records()) == self.config.epochs

    def records(self) -> list[dict[str, Any]]:
        """One record per epoch."""
        return read_records(self.folder)


def experiment_names() -> list[str]:
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def read_experiment(name: str, scale: str) -> Experiment:
    """The experiment called `name`, with the values that belong to `scale`.

    Raises:
        UserError: no such experiment, or an unknown key in its file.
    """
    if name not in experiment_names():
        raise UserError(f"unknown experiment {name!r}: there are {', '.join(experiment_names())}")
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    if unknown := set(content) - _KEYS:
        raise UserError(f"experiment {name} has the unknown key {min(unknown)}")
    runs = {
        run: _at_scale(options, scale)
        for run, options in content.get("runs", {}).items()
        if scale in options.get("scales", [scale])
    }
    settings = _at_scale(content.get("settings", {}), scale)
    return Experiment(content["measure"], runs, content.get("published", []), settings)


def _at_scale(options: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """The options, with the value for `scale` where there is one for each scale."""
    return {
        name: value[scale] if isinstance(value, dict) and scale in value else value
        for name, value in options.items()
    }


def resolve_runs(
    experiment: Experiment, scale: str, seeds: int, out: Path, options: Sequence[str]
) -> list[Run]:
    """All runs with all seeds, each after the one it starts from.

    A run's folder in `out` ends in a digest of everything that decides its result, so that
    experiments share runs of the same settings and no others.

    Args:
        options: of the command line, for every run.

    Raises:
        UserError: an option that is unknown or out of range.
    """
    runs: dict[tuple[str, int], Run] = {}
    for seed in range(seeds):
        for name, overrides in experiment.runs.items():
            parent = runs[overrides["after"], seed] if "after" in overrides else None
            arguments = ["--config", str(EXPERIMENTS / "scales" / f"{scale}.yaml")]
            for option, value in overrides.items():
                if option not in _RUN_KEYS:
                    text = value if isinstance(value, str) else json.dumps(value)
                    arguments += [f"--{option}", text]
            start = parent.folder / BEST if parent else "none"
            arguments += [*options, "--seed", str(seed), "--init_from", str(start)]
            step = overrides["step"]
            config = parse_config(ROOT / f"step{step}" / "config.yaml", arguments)
            digest = _digest(config, step, parent)
            slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
            # A run of another experiment may have this digest under another name.
            folder, *_ = *sorted(out.glob(f"*-{digest}")), out / f"{slug}-seed{seed}-{digest}"
            arguments += ["--save", str(folder)]
            runs[name, seed] = Run(name, seed, step, config, arguments, folder, parent)
    return list(runs.values())


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
