"""Hypothesis strategies: configurations, command lines and image folders that someone got wrong.

Examples are plain data, made into files by their `write`; nothing in them lets a run last long.
"""

import contextlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import command_line
from corruption import cut_the_end_off, flip_many_bits
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from utils.run.config import FIELDS

# Configurations and command lines

WRONG = [
    *("-1", "0", "1", "0.5", "1e308", "1e400", ".nan", "-.inf", "~", "''", "perhaps", "!!int x"),
    *("[]", "{}", "[0, -1]", "[[1]]", "{a: {b: c}}", "[1", "'", "*unknown", "2001-01-01"),
    *("!!python/object/apply:os.system ['true']", '"two\\nlines"', "2001-99-99", "/dev/null"),
]
WRONG_FOR = {
    "width": ["0.001", "1000", "-1", ".nan"],
    "image_size": ["1", "2"],
    "val_resize": ["2", "15"],
    "batch_size": ["1", "25"],
    "accumulate": ["2", "100"],
    "keep_epochs": ["[true]", "[0, 0]", "[.nan]", "0"],
    "learning_rate": ["1e300", "1e-300"],
    "weight_decay": ["1e300", "-1e300"],
    "model": ["reactnet_r18", "resnet18"],
    "optimizer": ["LBFGS", "SparseAdam", "Rprop", "Optimizer", "lr_scheduler", "adam"],
    "optimizer_options": [
        *("{betas: [0.9]}", "{betas: [a, b]}", "{fused: true, foreach: true}", "{eps: 1e400}"),
        *("{momentum: 0.9}", "{lr: 1}", "{1: 2}", "0.9"),
    ],
    "val_dir": ["train", "star", "nothing"],
    "teacher": ["resnet", ".", "nothing.pth.tar"],
    "init_from": [".", "nothing.pth.tar"],
    "data": [".", "nothing"],
}
WRONG_FILES = [
    *("", "# nothing", "- epochs", "epochs", "epochs: [1", "{a, b}", "1: 2", "\t- epochs"),
    *("epochs: 1\nepochs: 2", "--- {epochs: 1}\n--- {epochs: 2}", "<<: {epoch: 2}", "null: 2"),
]


def values(name: str) -> SearchStrategy[str]:
    """What may stand behind the name of a field in YAML: seldom right, and never endless."""
    chosen = st.sampled_from([*WRONG, *WRONG_FOR.get(name, [])])
    if name in ("width", "epochs"):  # of which many right values take long
        return chosen
    letters = st.text(st.characters(codec="ascii", exclude_characters="/\\.\0"), max_size=20)
    scalars = st.none() | st.floats() | st.dates() | letters
    made = scalars | st.lists(scalars, max_size=3) | st.dictionaries(letters, scalars, max_size=3)
    as_text = made.map(lambda value: yaml.safe_dump(value, default_flow_style=True))
    return chosen | as_text.map(lambda text: text.removesuffix("...\n"))


@dataclass(frozen=True)
class Mistake:
    """A configuration file and a command line."""

    content: bytes
    arguments: tuple[str, ...]

    def write(self, folder: Path) -> list[str]:
        """Make `config.yaml` in a folder; the arguments, for a program that works there."""
        (folder / "config.yaml").write_bytes(self.content)
        return list(self.arguments)


def mistakes(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    """Configurations and command lines with the fields `base`, some of which are wrong."""
    names = st.sampled_from(sorted(FIELDS))
    fields = names.flatmap(lambda name: st.tuples(st.just(name), values(name)))
    return _wrong_files(base) | _wrong_lines(base) | _wrong_fields(base, fields) | unfit(base)


def unfit(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    """Configurations with values that are mostly right by their type, so that a run begins."""
    names = st.sampled_from(sorted(WRONG_FOR))
    fields = names.flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(WRONG_FOR[name])))
    return _wrong_fields(base, fields)


def _wrong_files(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    encodings = st.sampled_from(["utf-8", "utf-16"])
    encoded = st.builds(str.encode, st.sampled_from(WRONG_FILES), encodings)
    content = st.binary(max_size=100) | encoded
    return st.builds(Mistake, content, st.just((*command_line(base), "--config", "config.yaml")))


def _wrong_fields(
    base: dict[str, Any], fields: SearchStrategy[tuple[str, str]]
) -> SearchStrategy[Mistake]:
    def written(wrong: list[tuple[str, str]]) -> Mistake:
        right = {name: value for name, value in base.items() if name not in dict(wrong)}
        # The wrong ones last: an open quote or bracket then takes in no right one.
        lines = [f"{name}: {value}" for name, value in (*right.items(), *wrong)]
        return Mistake("\n".join(lines).encode(), ("--config", "config.yaml"))

    some = st.lists(fields, min_size=1, max_size=3, unique_by=lambda field: field[0])
    return some.map(written)


def _wrong_lines(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    names = st.sampled_from(sorted(FIELDS))
    field = names.flatmap(lambda name: st.tuples(st.just(f"--{name}"), values(name)))
    paths = st.sampled_from(["nothing.yaml", ".", "", "/dev/null"])
    other = st.tuples(st.sampled_from(["--config", "--save", "--epoch", "--e"]), paths)
    alone = st.sampled_from(["-1", "--", "word", "-e", "--help", "--epochs", "--width=wide"])
    words = st.lists(field | other | st.tuples(alone), min_size=1, max_size=3)
    return words.map(lambda some: Mistake(b"{}", (*command_line(base), *sum(some, ()))))


# Image folders: each change is made to one path


def remove(path: Path, chance: random.Random) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_by_a_file(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.write_bytes(b"no image")


def replace_by_an_empty_folder(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.mkdir()


def rename(path: Path, chance: random.Random) -> None:
    names = ["two\nlines", "né🙂", "x" * 240, "with space", "-rf", "error: name", ".hidden"]
    path.rename(path.with_name(chance.choice(names) + path.suffix))


def link_to_nothing(path: Path, chance: random.Random) -> None:
    path.with_name(f"dangling{chance.randrange(100)}{path.suffix}").symlink_to("nothing")


def put_deeper(path: Path, chance: random.Random) -> None:
    inner = path.parent / "deep.png" / "er"
    inner.mkdir(parents=True, exist_ok=True)
    path.rename(inner / path.name)


def add_another_file(path: Path, chance: random.Random) -> None:
    path.with_name("notes.txt").write_text("no image")


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(cut_the_end_off(bytearray(path.read_bytes()), chance))


def flip(path: Path, chance: random.Random) -> None:
    path.write_bytes(flip_many_bits(bytearray(path.read_bytes()), chance))


def paint(path: Path, chance: random.Random) -> None:
    mode = chance.choice(["1", "L", "LA", "P", "I;16", "RGBA", "CMYK"])
    size = chance.choice([(1, 1), (1, 3000), (20, 20)])
    Image.new(mode, size).save(path.with_name(f"painted.{'jpg' if mode == 'CMYK' else 'png'}"))


REPLACEMENTS = (remove, replace_by_a_file, replace_by_an_empty_folder, rename)
CHANGES = [
    *((change, "*") for change in REPLACEMENTS),
    *((change, "*/*") for change in (*REPLACEMENTS, link_to_nothing, add_another_file)),
    *((change, "*/*/*.jpg") for change in (*REPLACEMENTS, link_to_nothing, add_another_file)),
    *((change, "*/*/*.jpg") for change in (put_deeper, cut, flip, paint)),
]


@dataclass(frozen=True)
class WrongFolder:
    """Changes to a folder of images, each with where it is made and the seed of its chances."""

    changes: tuple[tuple[tuple[Callable, str], int], ...]

    def write(self, images: Path, folder: Path) -> None:
        """Make `folder` a copy of `images`, and then change it."""
        shutil.copytree(images, folder)
        for (change, pattern), seed in self.changes:
            chance = random.Random(seed)
            # Some changes cannot be made after others, such as cutting an empty file.
            if paths := sorted(folder.glob(pattern)):
                with contextlib.suppress(OSError, ValueError):
                    change(chance.choice(paths), chance)

    def __repr__(self) -> str:
        return ", ".join(f"{change.__name__} {at} {seed}" for (change, at), seed in self.changes)


def wrong_folders() -> SearchStrategy[WrongFolder]:
    change = st.tuples(st.sampled_from(CHANGES), st.integers(0, 99))
    return st.lists(change, min_size=1, max_size=4).map(lambda some: WrongFolder(tuple(some)))
