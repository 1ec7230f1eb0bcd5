"""Configurations, command lines and image folders that someone got wrong, made by Hypothesis.

Examples are plain data, made into files by their `write`; nothing in them lets a run last long.
"""

import contextlib
import functools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from tests.damage import cut_the_end_off, flip_many_bits
from utils.run.config import FIELDS


def drawn(strategy: SearchStrategy, count: int, number: int) -> list:
    """`count` examples, which depend on the seed `number` alone."""
    examples = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example):
        examples.append(example)

    collect()
    return examples


def options(values: dict[str, Any]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


# Configurations and command lines

TYPED = ["-1", "0", "1", "0.5", "5e-324", "-1e308", "1e308", "1e400", ".nan", "-.inf", "", "~"]
HUGE = [str(2**63), str(2**64), str(10**30), "9" * 5000, "0x" + "f" * 5000, "1" * 400]
# Eight lists of eight of the list before, of which no message may show all.
BOMB = ", ".join(["&a0 [x]", *(f"&a{n + 1} [{', '.join([f'*a{n}'] * 8)}]" for n in range(8))])
ODD = [
    "[]",
    "{}",
    "[0, -1]",
    "[1e400, [2]]",
    "{a: {b: c}}",
    "2001-01-01",
    "2001-99-99",
    "!!int x",
    "!!float x",
    "!!bool perhaps",
    "!!binary é",
    "!!timestamp x",
    "!!set {a, b}",
    "!!python/object:os.system {}",
    "!!python/object/apply:os.system ['true']",
    "&a [*a]",
    "&a {b: *a}",
    "*unknown",
    "{? [1, 2] : 3}",
    '"\\0"',
    '"\\ud800"',
    '"two\\nlines"',
    "[" * 2000,
    "x" * 5000,
    "'",
    f"[{BOMB}]",
    "perhaps",
    "/proc/nothing",
    "/dev/null",
]
OWN = {
    "width": ["1e-300", "1000", "1e308", "-1", ".nan"],
    "image_size": ["2", "65535", "65536"],
    "val_resize": ["2", "65535", "65536"],
    "batch_size": ["1", "25", str(2**40)],
    "accumulate": ["2", str(2**40)],
    "seed": [str(2**62)],
    "keep_epochs": ["[true]", "[0, 0]", f"[{10**30}]", "[.nan]"],
    "learning_rate": ["1e300", "1e-300"],
    "weight_decay": ["1e300", "-1e300"],
    "model": ["reactnet_r18", "resnet18"],
    "optimizer": ["LBFGS", "SparseAdam", "Muon", "Rprop", "Optimizer", "lr_scheduler", "__doc__"],
    "optimizer_options": [
        "{betas: [0.9]}",
        "{betas: [a, b]}",
        "{fused: true, foreach: true}",
        "{capturable: true}",
        "{amsgrad: [1]}",
        "{amsgrad: perhaps}",
        "{maximize: 2001-01-01}",
        "{differentiable: true}",
        "{eps: 1e400}",
        f"{{eps: {10**400}}}",
        "{lr: 1}",
        "{1: 2}",
        "&a {betas: *a}",
    ],
    "val_dir": ["train", "''", "star", "nothing"],
    "teacher": ["resnet", "''", ".", "nothing.pth.tar"],
    "init_from": ["''", ".", "nothing.pth.tar"],
    "data": ["''", ".", "nothing"],
}
WHOLE_FILES = [
    "",
    "# nothing",
    "- epochs",
    "epochs",
    "[" * 5000,
    "{" * 5000,
    "epochs: 1\nepochs: 2",
    "--- {epochs: 1}\n--- {epochs: 2}",
    "%YAML 9.9\n---\nepochs: 1",
    "<<: 3",
    "<<: {epochs: 1, epoch: 2}",
    "\t- epochs",
    "&a {epochs: *a}",
    "!!python/object/new:os.system [true]",
    "1: 2",
    "null: 2",
    "[a, b]: 2",
    "{a, b}",
]


def values(name: str) -> SearchStrategy[str]:
    """What may stand behind the name of a field in YAML: seldom right, and never endless."""
    own = OWN.get(name, ["perhaps"])
    if name in ("width", "epochs"):  # of which many right values take long
        return st.sampled_from([*own, *HUGE, *ODD])
    letters = st.text(st.characters(codec="utf-8", exclude_characters="/\\."), max_size=20)
    scalars = st.none() | st.floats() | st.dates() | st.binary(max_size=5) | letters
    made = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
        max_leaves=4,
    )
    as_text = made.map(lambda value: yaml.safe_dump(value, default_flow_style=True))
    known = st.sampled_from([*TYPED, *HUGE, *ODD])
    return known | st.sampled_from(own) | as_text.map(lambda text: text.removesuffix("...\n"))


@dataclass(frozen=True)
class Mistake:
    """A configuration file, or a folder in its place, and a command line."""

    content: bytes | None
    arguments: tuple[str, ...]

    def write(self, folder: Path) -> list[str]:
        """Make `config.yaml` in a folder; the arguments, for a program that works there."""
        path = folder / "config.yaml"
        if self.content is None:
            path.mkdir()
        else:
            path.write_bytes(self.content)
        return list(self.arguments)


def mistakes(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    """Configurations and command lines with the fields `base`, some of which are wrong."""
    anywhere = st.sampled_from(sorted(FIELDS)), values
    # Right by their type, so that a run begins with many of them.
    unfit = st.sampled_from(sorted(OWN)), lambda name: st.sampled_from(OWN[name])
    return st.one_of(
        _wrong_files(base),
        _wrong_lines(base),
        _wrong_fields(base, *anywhere),
        _wrong_fields(base, *unfit),
    )


def _wrong_files(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    texts = st.sampled_from(WHOLE_FILES) | st.text(max_size=100)
    encoded = st.builds(str.encode, texts, st.sampled_from(["utf-8", "utf-16"]), st.just("replace"))
    content = st.none() | st.binary(max_size=100) | encoded
    return st.builds(Mistake, content, st.just((*options(base), "--config", "config.yaml")))


def _wrong_fields(
    base: dict[str, Any], names: SearchStrategy[str], value: Callable[[str], SearchStrategy[str]]
) -> SearchStrategy[Mistake]:
    some = st.lists(names, min_size=1, max_size=3, unique=True)
    wrong = some.flatmap(lambda those: st.fixed_dictionaries({name: value(name) for name in those}))

    def written(odd: dict[str, str]) -> Mistake:
        right = {name: str(value) for name, value in base.items() if name not in odd}
        # The wrong ones last: an open quote or bracket then takes in no right one.
        lines = [f"{name}: {value}" for name, value in {**right, **odd}.items()]
        return Mistake("\n".join(lines).encode(errors="replace"), ("--config", "config.yaml"))

    return wrong.map(written)


def _wrong_lines(base: dict[str, Any]) -> SearchStrategy[Mistake]:
    given = st.sampled_from(sorted(FIELDS)).flatmap(
        lambda name: st.one_of(
            st.just((f"--{name}",)),
            st.tuples(st.just(f"--{name}"), values(name)),
            values(name).map(lambda value: (f"--{name}={value}",)),
        )
    )
    paths = st.sampled_from(["nothing.yaml", ".", "", "/dev/null", "x" * 5000, "\udcff", "a\nb"])
    names = st.text(st.characters(codec="utf-8"), max_size=10)
    other = st.one_of(
        paths.map(lambda path: ("--config", path)),
        paths.map(lambda path: ("--save", path)),
        names.map(lambda name: (name,)),
        names.map(lambda name: (f"--{name}", "1")),
        st.sampled_from([("-1",), ("--",), ("--epoch", "1"), ("-e", "1"), ("--help",)]),
    )
    words = st.lists(given | other, min_size=1, max_size=3).map(lambda some: sum(some, ()))
    possible = words.filter(lambda some: not any("\0" in word for word in some))
    return possible.map(lambda some: Mistake(b"{}", (*options(base), *some)))


# Image folders


def on(pattern: str) -> Callable:
    """Make a change to one path into one to a folder: to any path there that fits, if it can be."""

    def over(change: Callable[[Path, random.Random], None]) -> Callable:
        @functools.wraps(change)
        def in_folder(folder: Path, chance: random.Random) -> None:
            if found := sorted(folder.glob(pattern)):
                with contextlib.suppress(OSError):
                    change(chance.choice(found), chance)

        return in_folder

    return over


def remove(path: Path, chance: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_a_file(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.write_bytes(b"no folder")


def empty(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.mkdir()


ODD_NAMES = ["two\nlines", "\udcff", "né🙂", "x" * 240, " ", "-rf", "error: name", ".hidden"]


def rename(path: Path, chance: random.Random) -> None:
    path.rename(path.with_name(chance.choice(ODD_NAMES) + path.suffix))


def link_to_itself(path: Path, chance: random.Random) -> None:
    name = path.with_name(f"loop{path.suffix}")
    name.unlink(missing_ok=True)
    name.symlink_to(name.name)


def link_to_nothing(path: Path, chance: random.Random) -> None:
    name = path.with_name(f"dangling{path.suffix}")
    name.unlink(missing_ok=True)
    name.symlink_to("nothing")


def link_back(path: Path, chance: random.Random) -> None:
    name = path / f"back{chance.randrange(3)}"
    if path.is_dir() and not name.is_symlink():
        name.symlink_to(chance.choice(["..", ".", "../..", "../../val"]))


def put_deeper(path: Path, chance: random.Random) -> None:
    inner = path.parent / "deep.png" / "er"
    inner.mkdir(parents=True, exist_ok=True)
    path.rename(inner / path.name)


def add_another_file(path: Path, chance: random.Random) -> None:
    path.with_name("notes.txt").write_text("no image")


def fill(path: Path, chance: random.Random) -> None:
    if path.is_file():
        path.write_bytes(chance.choice([b"", b"no image", chance.randbytes(500)]))


def cut(path: Path, chance: random.Random) -> None:
    if path.is_file() and path.stat().st_size > 300:
        path.write_bytes(cut_the_end_off(bytearray(path.read_bytes()), chance))


def flip(path: Path, chance: random.Random) -> None:
    if path.is_file() and path.stat().st_size > 300:
        path.write_bytes(flip_many_bits(bytearray(path.read_bytes()), chance))


ODD_IMAGES = {
    "1.png": ("RGB", (1, 1)),
    "thin.png": ("RGB", (1, 3000)),
    "cmyk.jpg": ("CMYK", (20, 20)),
    "bits.png": ("1", (20, 20)),
    "grey.png": ("LA", (20, 20)),
    "palette.png": ("P", (20, 20)),
    "deep.png": ("I;16", (20, 20)),
    "floats.tiff": ("F", (20, 20)),
    "clear.webp": ("RGBA", (20, 20)),
}


def paint(path: Path, chance: random.Random) -> None:
    if path.is_file():
        name, (mode, size) = chance.choice(sorted(ODD_IMAGES.items()))
        Image.new(mode, size).save(path.with_name(name))


def animate(path: Path, chance: random.Random) -> None:
    if path.is_file():
        frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
        name = chance.choice(["moving.png", "moving.webp", "pages.tiff"])
        frames[0].save(path.with_name(name), save_all=True, append_images=frames[1:])


SPLITS, CLASSES, IMAGES = "*", "*/*", "*/*/*"
CHANGES = [
    *(on(SPLITS)(change) for change in (remove, make_a_file, empty, rename)),
    *(
        on(CLASSES)(change)
        for change in (
            remove,
            make_a_file,
            empty,
            rename,
            link_to_itself,
            link_to_nothing,
            link_back,
            add_another_file,
        )
    ),
    *(
        on(IMAGES)(change)
        for change in (
            remove,
            rename,
            link_to_itself,
            link_to_nothing,
            put_deeper,
            add_another_file,
            fill,
            cut,
            flip,
            paint,
            animate,
        )
    ),
]


@dataclass(frozen=True)
class WrongFolder:
    """Changes to a folder of images, each with the seed of its chances."""

    changes: tuple[tuple[Callable, int], ...]

    def write(self, images: Path, folder: Path) -> Path:
        """`folder`, made a copy of `images` and then changed."""
        shutil.copytree(images, folder)
        for change, number in self.changes:
            change(folder, random.Random(number))
        return folder

    def __repr__(self) -> str:
        return ", ".join(f"{change.__name__} {number}" for change, number in self.changes)


def wrong_folders() -> SearchStrategy[WrongFolder]:
    change = st.tuples(st.sampled_from(CHANGES), st.integers(0, 99))
    return st.lists(change, min_size=1, max_size=4).map(lambda some: WrongFolder(tuple(some)))
