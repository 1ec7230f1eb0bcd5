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
    ours        true for a control or an extension, which is not the paper's
    added       true for a claim written when results of a seed had been seen
    flawed      true for a claim that turned out to measure something else than it says

The quantity, sum of `plus` less sum of `minus`, is formed for each seed that has all terms.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.table import Table, as_text

SEEN, CONTRADICTED, NOT_DECIDED, NOT_RUN = "seen", "contradicted", "not decided", "not run"
FEWEST_SEEDS = 3  # that have an interval: two that happen to agree would decide
MOST_SEEDS = 100
REDUCTIONS = {
    "mean": np.mean,
    "std": np.std,
    "min": np.min,
    "max": np.max,
    "range": np.ptp,
    "std / mean": lambda values: np.std(values) / np.mean(values),
    "min / mean": lambda values: np.min(values) / np.mean(values),
}

Claim = Term = Mapping[str, Any]


class Verdict(NamedTuple):
    """One value for each seed, their mean, and what its 95 % interval says."""

    values: np.ndarray
    mean: float
    margin: float  # half of the interval; infinite for fewer than three seeds
    distance: float  # of the mean from the nearest end of what the paper says
    word: str


def judge(claim: Claim, rows: Table) -> Verdict:
    """Raises UserError for a column that the rows lack."""
    values = per_seed(claim, rows)
    mean = values.mean() if len(values) else math.nan
    margin = margin_of(values)
    # What the paper says holds for numbers from `least` to `most`.
    bound = claim.get("tolerance", 0.0)
    sides = {"above": (0.0, math.inf), "below": (-math.inf, 0.0), "equal": (-bound, bound)}
    least, most = sides[claim["paper"]]
    distance = min(abs(mean - least), abs(mean - most))
    word = NOT_DECIDED if len(values) else NOT_RUN
    if margin < distance:
        word = SEEN if least < mean < most else CONTRADICTED
    return Verdict(values, mean, margin, distance, word)


def seeds_needed(verdict: Verdict) -> float:
    """The fewest seeds that decide it if mean and scatter stay; infinite above `MOST_SEEDS`."""
    for count in range(FEWEST_SEEDS, MOST_SEEDS + 1):
        if margin_of(verdict.values, count) < verdict.distance:
            return count
    return math.inf


def margin_of(values: np.ndarray, count: int | None = None) -> float:
    """Half of the 95 % interval of the mean, by Student's t, of `count` values scattered as these.

    Without `count` of these themselves; infinite for fewer than `FEWEST_SEEDS` of them.
    """
    if len(values) < FEWEST_SEEDS:
        return math.inf
    count = count or len(values)
    return student_t(count - 1) * values.std(ddof=1) / math.sqrt(count)


@functools.cache
def student_t(freedom: int) -> float:
    """The t between which and -t lie 95 % of Student's distribution.

    With t = sqrt(freedom) tan(a), the density in a is proportional to cos(a)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.cumsum(density) - (density + density[0]) / 2  # by trapezoids
    return math.sqrt(freedom) * math.tan(np.interp(0.95, share / share[-1], angles))


def per_seed(claim: Claim, rows: Table) -> np.ndarray:
    """The claim's quantity, of each seed that has all rows of its terms that any seed has."""
    terms, reduce = signed_terms(claim), REDUCTIONS[claim.get("of", "mean")]
    seeds = [
        [term_numbers(term, claim, seed) for _, term in terms]
        for seed in rows.split("seed").values()
    ]
    counts = [tuple(map(len, of_seed)) for of_seed in seeds]
    complete = tuple(map(max, zip(*counts, strict=True)))
    return np.array(
        [
            sum(sign * reduce(n) for (sign, _), n in zip(terms, of_seed, strict=True))
            for of_seed, count in zip(seeds, counts, strict=True)
            if count == complete and all(count)
        ]
    )


def signed_terms(claim: Claim) -> list[tuple[int, Term]]:
    """1 and each term of `plus`, -1 and each of `minus`."""
    signed = []
    for sign, side in ((1, "plus"), (-1, "minus")):
        terms = claim.get(side, [])
        signed += [(sign, term) for term in (terms if isinstance(terms, list) else [terms])]
    return signed


def term_numbers(term: Term, claim: Claim, rows: Table) -> np.ndarray:
    """The numbers of the rows that a term chooses."""
    for column, chosen in term.items():
        if column != "column":
            rows = select(rows, column, chosen)
    return rows.numbers(term.get("column") or claim["column"])


def select(rows: Table, column: str, chosen: Any) -> Table:
    """The rows with one of the values chosen; `last` is the last, unless it is a value itself."""
    there = rows.distinct(column)
    if chosen == "last" and there and "last" not in there:
        chosen = there[-1]
    wanted = {str(as_text(value)) for value in (chosen if isinstance(chosen, list) else [chosen])}
    return Table(row for row in rows if row[column] in wanted)


def quantity(claim: Claim) -> str:
    """The claim's quantity in words, such as `top1: *A* - *B*`, in Markdown."""
    if "quantity" in claim:
        return claim["quantity"]
    text = ""
    for sign, term in signed_terms(claim):
        words = [
            str(value) if column in ("run", "optimizer", "column") else f"{column} {value}"
            for column, value in term.items()
        ]
        text += (" + " if sign > 0 else " - ") + f"*{' / '.join(words)}*"
    name = " ".join(claim[key] for key in ("of", "column") if key in claim)
    text = text.removeprefix(" + ")
    return f"{name}: {text}" if name else text
