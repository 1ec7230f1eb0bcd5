"""What the CSV of an experiment says of a claim of the paper.

A claim, in an experiment's YAML, is a quantity and the side of 0 on which the paper sees it:

    text        the claim
    plus, minus one term or a list: columns and their values, which choose rows of the CSV; a list
                of values means any of them, `last` the last there is
    column      of which the terms are numbers; a term may name its own
    of          how several rows of a seed become one number, a key of `REDUCTIONS` (the mean)
    paper       above, below, or equal: no further from 0 than `tolerance`
    published   the paper's value of the same quantity, where it is known
    quantity    in words, where those made of the terms would not be clear

The quantity, sum of `plus` less sum of `minus`, is formed for each seed that has all terms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.experiments.table import Table, as_text

SEEN, CONTRADICTED, NOT_DECIDED = "seen", "contradicted", "not decided"
REDUCTIONS = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max, "range": np.ptp}


@dataclass(frozen=True)
class Verdict:
    """One value for each seed, their mean, and what its 95 % interval says."""

    values: np.ndarray
    mean: float
    margin: float  # half of the interval; infinite for fewer than two seeds
    word: str


def judge(claim: Mapping[str, Any], rows: Table) -> Verdict:
    """Raises UserError for a column that the rows lack."""
    values = np.array(list(per_seed(claim, rows).values()))
    mean = values.mean() if len(values) else math.nan
    margin = margin_of(values)
    low, high = mean - margin, mean + margin
    # What the paper says holds for numbers from `least` to `most`.
    tolerance = claim.get("tolerance", 0.0)
    least = 0.0 if claim["paper"] == "above" else -tolerance or -math.inf
    most = 0.0 if claim["paper"] == "below" else tolerance or math.inf
    word = NOT_DECIDED
    if low > least and high < most:
        word = SEEN
    elif low > most or high < least:
        word = CONTRADICTED
    return Verdict(values, mean, margin, word)


def margin_of(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean, by Student's t."""
    count = len(values)
    if count < 2:
        return math.inf
    return student_t(count - 1) * values.std(ddof=1) / math.sqrt(count)


def student_t(freedom: int, level: float = 0.95) -> float:
    """The t between which and -t lies a share `level` of Student's distribution.

    With t = sqrt(freedom) tan(a), the density in a is proportional to cos(a)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.cumsum(density) - (density + density[0]) / 2  # by trapezoids
    return math.sqrt(freedom) * math.tan(np.interp(level, share / share[-1], angles))


def per_seed(claim: Mapping[str, Any], rows: Table) -> dict[str, float]:
    """Seed -> the claim's quantity, of the seeds that have all its terms."""
    values = {}
    for seed in rows.distinct("seed"):
        total = 0.0
        for sign, side in ((1, "plus"), (-1, "minus")):
            for term in terms(claim, side):
                total += sign * term_value(term, claim, rows.where(seed=seed))
        if not math.isnan(total):
            values[seed] = total
    return values


def terms(claim: Mapping[str, Any], side: str) -> list[Mapping[str, Any]]:
    side_terms = claim.get(side, [])
    return side_terms if isinstance(side_terms, list) else [side_terms]


def term_value(term: Mapping[str, Any], claim: Mapping[str, Any], rows: Table) -> float:
    """The number of a term; nan if it has no rows."""
    for column, chosen in term.items():
        if column != "column":
            rows = select(rows, column, chosen)
    numbers = rows.numbers(column_of(term, claim))
    return REDUCTIONS[claim.get("of", "mean")](numbers) if len(numbers) else math.nan


def column_of(term: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    return term.get("column") or claim["column"]


def select(rows: Table, column: str, chosen: Any) -> Table:
    """The rows with one of the values chosen; `last` is the last, unless it is a value itself."""
    there = rows.distinct(column)
    if chosen == "last" and there and "last" not in there:
        chosen = there[-1]
    wanted = {str(as_text(value)) for value in (chosen if isinstance(chosen, list) else [chosen])}
    return Table(row for row in rows if row[column] in wanted)


def quantity(claim: Mapping[str, Any]) -> str:
    """The claim's quantity in words, such as `top1: A - B`."""
    if "quantity" in claim:
        return claim["quantity"]
    sides = []
    for side in ("plus", "minus"):
        for term in terms(claim, side):
            choice = [
                str(value) if column in ("run", "optimizer") else f"{column} {value}"
                for column, value in term.items()
                if column != "column"
            ]
            if "column" in term:
                choice.append(term["column"])
            sides.append((" + " if side == "plus" else " - ") + " / ".join(choice))
    name = " ".join(claim[key] for key in ("of", "column") if key in claim)
    text = "".join(sides).removeprefix(" + ")
    return f"{name}: {text}" if name else text
