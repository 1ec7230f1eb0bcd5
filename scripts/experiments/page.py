"""The page of results: verdicts, pictures and tables of the CSVs in a folder.

    python -m scripts.experiments.page docs/results/experiments

It writes README.md and NAME.png beside each NAME.csv.  What no CSV says comes from two files there:
about.md, which scale it is and what that can say, and found.yaml, what each picture shows.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from scripts.experiments import spec, verdicts
from scripts.experiments.plots import draw
from scripts.experiments.table import read_table
from utils.checkpoint.files import atomic_write
from utils.run.command_line import Parser, command, markdown_table
from utils.run.errors import UserError

MARKS = {"added": " †", "flawed": " ‡"}  # of claims that are not counted
HEADER = ["here, 95 % interval", "seeds", "verdict"]
READING = f"""\
- *Seen*: all of the interval lies on the paper's side of 0, or within the tolerance of what is to
  be equal.
- *Contradicted*, at this scale: all of it lies outside.
- *Not decided*: neither, which is no sign of equality, or fewer than three seeds; beside it the
  number of seeds that would decide it, if mean and scatter stay.
- Nothing is corrected for the number of claims: of differences that are truly 0, one in 20 is
  decided wrongly.
- Not counted are{MARKS["added"]}, written when results of the first seed had been seen, and
 {MARKS["flawed"]}, found to measure something else than they say.
- FF ratio: share of the signs that one update flips, the mean over a training; C2I ratio: share
  that still is as at the start; CAM: mean |w| of a kernel; SDAM: its standard deviation over the
  kernels of a layer; saturation: share of activations beyond 1."""


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="of the CSVs")
    folder = parser.parse_args().folder
    measured = [name for name in spec.experiment_names() if (folder / f"{name}.csv").exists()]
    if not measured:
        raise UserError(f"{folder} has no CSV of an experiment: copy them there")
    # Tables, then figures, then what is not of the paper.
    names = sorted(measured, key=lambda n: ("table" not in n, "fig" not in n))
    found = folder / "found.yaml"
    sentences = yaml.safe_load(found.read_text()) if found.exists() else {}
    sections = [section(name, folder, sentences) for name in names]
    page = "\n\n".join([*heading(names, folder), *sections])
    atomic_write(folder / "README.md", lambda file: file.write(f"{page}\n".encode()))
    print(folder / "README.md")


def heading(names: list[str], folder: Path) -> list[str]:
    papers, ours = (
        [row for n in names for row in verdict_rows(n, folder, o)] for o in (False, True)
    )
    marks = tuple(MARKS.values())
    words = [row[-1].split("**")[1] for row in papers if not row[0].endswith(marks)]
    outcomes = (verdicts.SEEN, verdicts.CONTRADICTED, verdicts.NOT_DECIDED, verdicts.NOT_RUN)
    counts = ", ".join(f"{words.count(word)} {word}" for word in outcomes)
    about = folder / "about.md"
    tables = {
        ("claim of the paper", "quantity", "paper (ImageNet)"): papers,
        ("control or extension of ours", "quantity", "expected"): ours,
    }
    return [
        "# The paper's claims, tables and figures",
        f"{len(words)} claims: {counts}. Each is a quantity with a side, formed for every seed from"
        " runs of that seed; its verdict is that of the 95 % interval of its mean over the seeds"
        " (Student's t).",
        READING,
        *(markdown_table([[*header, *HEADER], *rows]) for header, rows in tables.items() if rows),
        *([about.read_text().strip()] if about.exists() else []),
    ]


def verdict_rows(name: str, folder: Path, ours: bool) -> list[list[str]]:
    """A row for each claim of an experiment that is the paper's, or ours."""
    rows = read_table(folder / f"{name}.csv").where(source="measured")
    judged = []
    for claim in spec.read_experiment(name, "quick").claims:  # the same at every scale
        if claim.get("ours", False) is not ours:
            continue
        verdict = verdicts.judge(claim, rows)
        count, has_interval = len(verdict.values), math.isfinite(verdict.margin)
        here = f"{verdict.mean:.3g}" if count else ""
        if has_interval:
            low, high = verdict.mean - verdict.margin, verdict.mean + verdict.margin
            here += f" [{low:.3g}, {high:.3g}]"
        published = format(float(claim["published"]), ".3g") if "published" in claim else ""
        side = f"{claim['paper']} 0"
        side += f" ± {claim['tolerance']:g}" if "tolerance" in claim else ""
        marks = "".join(mark for key, mark in MARKS.items() if claim.get(key))
        text = f"[{name}](#{name}): {claim['text']}{marks}"
        quantity = verdicts.quantity(claim)
        expected = f"{published} ({side})" if published else side
        word = f"**{verdict.word}**"
        if verdict.word == verdicts.NOT_DECIDED and has_interval:
            needed = verdicts.seeds_needed(verdict)
            word += f" ({f'>{verdicts.MOST_SEEDS}' if math.isinf(needed) else needed} seeds)"
        judged.append([text, quantity, expected, here, str(count), word])
    return judged


def section(name: str, folder: Path, found: Mapping[str, str]) -> str:
    """Picture and table of an experiment, and what was `found`, under its name."""
    experiment = spec.read_experiment(name, "quick")
    table = draw(name, folder / f"{name}.csv", folder / f"{name}.png")
    texts = {"Claim": experiment.claim, "Picture": experiment.look, "Found": found.get(name, "")}
    lines = [f"*{key}:* {' '.join(text.split())}" for key, text in texts.items() if text]
    picture = f"![{name}]({name}.png)"
    return "\n\n".join([f"## {name}", experiment.title, picture, "<br>\n".join(lines), table])


if __name__ == "__main__":
    main()
