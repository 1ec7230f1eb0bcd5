"""The configuration of a run: a YAML file, overridden on the command line, checked field by field.

Relative paths in a YAML file count from the file's own folder, those on the command line from
where the command is given.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from utils.binarize import ACTIVATION_STES, LATENT_INITS
from utils.data.decode import DECODERS
from utils.data.transforms import LIGHTING, RESIZE
from utils.optim import DECAY_GROUPS, SCHEDULES
from utils.precision import PRECISIONS
from utils.run.command_line import Parser
from utils.run.device import DEVICES
from utils.run.errors import UserError

BUILTIN_DATA = ("shapes", "cifar10")
BOUNDS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _option(help_text: str, default: Any = dataclasses.MISSING, **metadata: Any):
    """A field with its range (`choices` and the keys of `BOUNDS`), and

    path: whether it names a file;
    place: whether it only says where things lie, so that a run may be continued with another value.
    """
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a training run.  Those without a default are the recipe of `config.yaml`."""

    # Data
    data: str = _option("folder of train/ and val/, or shapes, or cifar10", path=True, place=True)
    val_dir: str = _option("name of the validation folder inside data", "val", place=True)
    cache_dir: str = _option("where shapes and cifar10 are kept", path=True, place=True)
    workers: int | None = _option(
        "loading processes of each process; none: one per core", None, minimum=0, place=True
    )
    train_per_class: int | None = _option("use the first N images of a class", None, minimum=1)
    val_per_class: int | None = _option("the same for validation", None, minimum=1)
    skip_unreadable: int = _option(
        "training images that may be unreadable, each replaced by the next",
        0,
        minimum=0,
        place=True,
    )
    image_size: int = _option("pixels, height and width", 224, minimum=1)
    val_resize: int = _option("shorter side before the central crop", 256, minimum=1)
    crop_scale: float = _option("smallest area of a random crop", 0.08, above=0, maximum=1)
    lighting: str = _option("colour noise", "released", choices=LIGHTING)

    # Network
    model: str = _option("name of a network in models/")
    binary_activations: bool = _option("Sign before each binary convolution")
    binary_weights: bool = _option("mean|w| * Sign(w) in each binary convolution")
    activation_ste: str | None = _option(
        "gradient of Sign; none for the network's own", None, choices=ACTIVATION_STES
    )
    latent_init: str = _option("latent weights from scratch", "positive", choices=LATENT_INITS)
    latent_scale: float = _option("multiplies latent weights from scratch", 1.0, above=0)
    width: float = _option("multiplies every channel count", 1.0, above=0)
    small_images: bool = _option("fewer strides, for 32-pixel images", False)
    init_from: str | None = _option("checkpoint to start from, or none", path=True, place=True)

    # Loss
    teacher: str | None = _option("torchvision network, checkpoint, or none (labels)", path=True)
    teacher_checkpoint: str | None = _option(
        "weights of the torchvision teacher, to download none", None, path=True, place=True
    )
    label_smoothing: float = _option("only without a teacher", 0.0, minimum=0, below=1)

    # Optimization
    epochs: int = _option("length of the run", minimum=1)
    batch_size: int = _option("global batch, divided over the processes", minimum=1)
    learning_rate: float = _option("base rate", above=0)
    latent_rate: float = _option("multiplies the learning rate of latent weights", 1.0, above=0)
    weight_decay: float = _option(
        "of the decay group, added to the gradient (AdamW: to the weights)"
    )
    optimizer: str = _option("name in torch.optim", "Adam")
    optimizer_options: dict | None = _option("its arguments: {momentum: 0.9}", None)  # noqa: RUF009
    decay_group: str = _option(
        "what decays; released includes the shifts", "released", choices=DECAY_GROUPS
    )
    schedule: str = _option(
        "of the learning rate; released: linear, one epoch ahead", "released", choices=SCHEDULES
    )
    accumulate: int = _option("parts a batch is computed in, BN statistics of each", 1, minimum=1)

    # Speed
    decoder: str = _option(
        "who decodes training images; nvimagecodec decodes a JPEG's crop alone, same pixels",
        "pil",
        choices=DECODERS,
        place=True,
    )
    resize: str = _option(
        "who resizes crops; torch is faster, a byte may differ by 2", "pil", choices=RESIZE
    )
    cache_images: bool = _option(
        "keep a small data set of square images of one size on the device, and crop whole batches"
        " there: other random draws, a byte may differ by 2",
        False,
    )
    precision: str = _option("number format of both passes", "float32", choices=PRECISIONS)
    compile: bool = _option("torch.compile the network and its teacher", False)
    channels_last: bool = _option("memory layout of convolutions", False)

    # Run
    device: str = _option("auto is the GPU if there is one", "auto", choices=DEVICES, place=True)
    save: str = _option("folder for checkpoints, logs and configuration", path=True, place=True)
    keep_epochs: list | None = _option("keep these epochs' checkpoints: [0, 9]", None, place=True)  # noqa: RUF009
    checkpoint_minutes: float = _option(
        "between checkpoints within an epoch; 0: each iteration", 15.0, minimum=0, place=True
    )
    seed: int = _option(
        "random seed of initialization, order and augmentation", 0, minimum=0, maximum=2**63 - 1
    )
    live_measures: bool = _option("FF, C2I, saturation, CAM and SDAM in each epoch's record", True)
    sync_bn: bool = _option("BN statistics over all processes instead of each one's", False)

    def __post_init__(self):
        if self.val_resize < self.image_size:
            raise UserError(
                f"val_resize {self.val_resize} is smaller than the image_size {self.image_size}"
                " that is cut out of it: make it at least as large"
            )
        if any(type(epoch) is not int or epoch < 0 for epoch in self.keep_epochs or ()):
            raise UserError(f"keep_epochs must be whole numbers from 0, not {self.keep_epochs}")
        if self.teacher and self.label_smoothing:
            raise UserError(
                "label_smoothing acts on labels, which a teacher replaces:"
                " set it to 0, or teacher to none"
            )

    def network_options(self) -> dict[str, Any]:
        """The constructor arguments of the network, all but the number of classes."""
        names = ["binary_activations", "binary_weights", "latent_init", "latent_scale", "width"]
        names += ["small_images", "activation_ste"]
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields that change the result and differ from a saved configuration."""
        return [
            f"{name} {value} (there {other[name]})"
            for name, value in vars(self).items()
            if name in other and value != other[name] and not _is_moved(name, value, other[name])
        ]


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_TYPES = get_type_hints(Config)
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def _valid(name: str, value: Any) -> Any:
    """`value` as the type of field `name`, in its range."""
    *alternatives, last = get_args(_TYPES[name]) or (_TYPES[name],)
    target = alternatives[0] if alternatives else last
    if last is NoneType and (value is None or value == "none"):
        return None
    if target is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not target or (target is float and not math.isfinite(value)):
        raise UserError(f"{name} must be {_TYPE_NAMES[target]}, not {value!r:.200}")
    checks = FIELDS[name].metadata
    if "choices" in checks and value not in checks["choices"]:
        raise UserError(f"{name} must be one of {', '.join(checks['choices'])}, not {value!r:.200}")
    for check, (holds, words) in BOUNDS.items():
        if check in checks and not holds(value, checks[check]):
            raise UserError(f"{name} must be {words} {checks[check]}, not {value}")
    return value


def _is_path(name: str, value: Any) -> bool:
    if name == "data":
        return value not in BUILTIN_DATA
    if name == "teacher" and value is not None:
        return os.sep in value or "." in value  # no torchvision network has either in its name
    return value is not None and FIELDS[name].metadata.get("path", False)


def unknown_option(name: str, valid: str) -> UserError:
    close = difflib.get_close_matches(name.lstrip("-"), FIELDS, n=1)
    guess = f", perhaps {close[0]}" if close else ""
    return UserError(f"unknown option {name!r}{guess}: the valid ones are {valid}")


def _is_moved(name: str, value: Any, other: Any) -> bool:
    """Whether two values of a field may say where the same thing lies."""
    if name in ("data", "init_from"):
        return _is_path(name, value) and _is_path(name, other)
    return FIELDS[name].metadata.get("place", False)


def checked(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Values of known fields, typed, in range, with paths made absolute from `base`."""
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise unknown_option(unknown[0], ", ".join(FIELDS))
    result = {}
    for name, value in values.items():
        value = _valid(name, value)
        result[name] = os.path.normpath(base / value) if _is_path(name, value) else value
    return result


class _Loader(yaml.SafeLoader):
    """Reads 5e-6 as a number, as YAML 1.2 does, and refuses a name that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [name.value for name, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            problem = f"{twice!r} stands twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The checked fields of a YAML file."""
    try:
        values = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} must hold one `name: value` per line")
    return checked(values, path.absolute().parent)


def parse_config(
    default: Path, arguments: Sequence[str] | None = None, description: str = ""
) -> Config:
    """`default` YAML, then `--config FILE`, then the other command-line options.

    Raises:
        UserError: an unknown name, a wrong type or range, or a file that cannot be read.
    """
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE", help="YAML laid over config.yaml")
    for f in FIELDS.values():
        text = f.metadata["help"]
        if "choices" in f.metadata:
            text += f": {', '.join(f.metadata['choices'])}"
        if f.default is not dataclasses.MISSING:
            given = f.default if isinstance(f.default, str) else str(f.default).lower()
            text += f" (default {given})"
        parser.add_argument(f"--{f.name}", metavar="X", default=argparse.SUPPRESS, help=text)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise unknown_option(unknown[0], "--config, --" + ", --".join(FIELDS))
    options = vars(namespace)
    overlay = options.pop("config")
    values = read_yaml(default) | (read_yaml(Path(overlay)) if overlay else {})
    values |= checked({name: _parsed(name, text) for name, text in options.items()}, Path.cwd())
    return _complete(values, default)


def _parsed(name: str, text: str) -> Any:
    """Command-line text as YAML would read it, except where the field is text anyway."""
    if str in (_TYPES[name], *get_args(_TYPES[name])):
        return text
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        return text


def _complete(values: Mapping[str, Any], source: Path | str) -> Config:
    required = [f.name for f in FIELDS.values() if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}")
    return Config(**values)


def from_saved(values: Any, source: Path | str) -> Config:
    """The configuration that a checkpoint carries, checked like one just written."""
    if not isinstance(values, dict):
        raise UserError(f"{source} carries no configuration: it was not written by this repo")
    try:
        return _complete(checked(values, Path.cwd()), "it")
    except UserError as error:
        raise UserError(f"the configuration in {source} is another version's: {error}") from error


def as_yaml(config: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
