"""Verdicts on the paper's claims, against cases computed by hand, and the page that shows them."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from scripts.experiments import spec
from scripts.experiments.table import Row, Table, write_table
from scripts.experiments.verdicts import (
    Verdict,
    judge,
    margin_of,
    quantity,
    seeds_needed,
    signed_terms,
    student_t,
)
from utils.run.errors import UserError


def table(**runs: list[float]) -> Table:
    """A row for each run and seed: run=[top1 of seed 0, of seed 1, ...]."""
    return Table(
        Row(source="measured", run=run, seed=str(seed), top1=str(value))
        for run, values in runs.items()
        for seed, value in enumerate(values)
    )


def verdict(a: list[float], paper: str, **more: float) -> Verdict:
    """On top1 of run a less that of run b, which is 60, 61 and 62."""
    terms = {"plus": {"run": "a"}, "minus": {"run": "b"}}
    claim = {"column": "top1", "paper": paper, **terms, **more}
    return judge(claim, table(a=a, b=[60, 61, 62]))


def word(a: list[float], paper: str, **more: float) -> str:
    return verdict(a, paper, **more).word


def test_intervals_are_those_of_a_printed_table_of_students_t():
    for freedom, t in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (30, 2.0423)):
        assert student_t(freedom) == pytest.approx(t, abs=1e-4)
    # Mean 2, deviation 1: 4.3027 * 1 / sqrt(3).
    assert margin_of(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.4841, abs=1e-4)
    assert margin_of(np.array([1.0])) == math.inf
    assert margin_of(np.array([1.0, 2.0])) == math.inf


def test_differences_are_paired_by_seed_and_decided_by_their_interval():
    one = [61, 62.1, 62.9]  # differences 1, 1.1, 0.9: 1 +- 0.25
    assert word(one, "above") == "seen"
    assert word(one, "below") == "contradicted"
    assert word([61, 63, 65], "above") == "not decided"  # 1, 2, 3: 2 +- 2.48
    assert word(one[:2], "above") == "not decided"  # two seeds: 1, 1.1
    assert word([], "above") == "not run"
    # The whole interval is within the tolerance, partly, or not at all.
    assert word(one, "equal", tolerance=2) == "seen"
    assert word(one, "equal", tolerance=1) == "not decided"
    assert word(one, "equal", tolerance=0.5) == "contradicted"


def test_of_what_is_not_decided_the_seeds_that_would_decide_it_are_counted():
    # Differences 0, 1, 2, deviation 1: 2.571 / sqrt(6) = 1.05, and 2.447 / sqrt(7) = 0.92.
    assert seeds_needed(verdict([60, 62, 64], "above")) == 7
    assert seeds_needed(verdict([60, 62, 64], "equal", tolerance=2)) == 7
    assert seeds_needed(verdict([59, 62.1, 62], "above")) == math.inf  # -1, 1.1, 0
    assert seeds_needed(verdict([61], "above")) == math.inf
    assert seeds_needed(verdict([61, 63], "above")) == math.inf


def test_a_seed_that_lacks_rows_which_another_has_is_left_out():
    rows = table(a=[61, 62, 63], b=[60, 61, 62])
    claim = {"column": "top1", "of": "max", "plus": {"run": ["a", "b"]}, "paper": "above"}
    assert judge(claim, rows).values.tolist() == [61, 62, 63]
    assert judge(claim, Table(rows[:-1])).values.tolist() == [61, 62]


def test_terms_choose_rows_and_reduce_them():
    rows = Table(
        Row(source="measured", run="a", seed="0", epoch=str(epoch), layer=str(layer), x=str(x))
        for epoch, layer, x in ((0, 1, 5), (0, 2, 7), (9, 1, 1), (9, 2, 4))
    )
    term = {"run": "a", "epoch": "last"}
    reduced = (("mean", 2.5), ("std", 1.5), ("min", 1), ("max", 4), ("range", 3))
    for of, value in (*reduced, ("std / mean", 0.6), ("min / mean", 0.4)):
        assert judge({"column": "x", "of": of, "plus": term, "paper": "above"}, rows).mean == value
    both = {"column": "x", "plus": [term, {"epoch": 0, "layer": [2, 3]}], "minus": {"epoch": 0}}
    assert judge(both | {"paper": "above"}, rows).mean == 2.5 + 7 - 6
    with pytest.raises(UserError, match="no column 'y'"):
        judge({"column": "y", "plus": term, "paper": "above"}, rows)
    assert quantity(both) == "x: *a / epoch last* + *epoch 0 / layer [2, 3]* - *epoch 0*"


def test_every_claim_names_runs_of_its_experiment_and_a_side():
    for name in spec.experiment_names():
        experiment = spec.read_experiment(name, "cifar10")
        runs = {*experiment.runs, *experiment.settings.get("optimizers", ())}
        for one in experiment.claims:
            assert one["text"] and one["paper"] in ("above", "below", "equal")
            for _, term in signed_terms(one):
                assert term.get("run") in runs or "optimizer" in term, (name, term)


def test_the_page_has_verdicts_pictures_and_tables_of_what_csvs_there_are(
    run_script, tmp_path, monkeypatch
):
    run_script("experiments.page", tmp_path).assert_one_sentence("has no CSV")
    rows = [{**row, "top5": 90} for row in table(A=[61, 62.1, 62.9], B=[60, 61, 62], C=[60])]
    rows += [{"source": "published", "run": "A", "top1": 70}]
    write_table(tmp_path / "table4.csv", rows)
    (tmp_path / "about.md").write_text("On ten images.")
    (tmp_path / "found.yaml").write_text("table4: A is right of B.")
    claim = {"column": "top1", "plus": {"run": "A"}, "minus": {"run": "B"}, "paper": "above"}
    nearly = claim | {"paper": "equal", "tolerance": 1.1}
    claims = [
        claim | {"text": "A is better", "published": 2.93},
        claim | {"text": "late", "added": True},
        claim | {"text": "beside the point", "flawed": True},
        claim | {"text": "control", "ours": True, "paper": "below"},
        nearly | {"text": "equal", "ours": True},
        claim | {"text": "one seed", "minus": {"run": "C"}, "ours": True},
        claim | {"text": "no seed", "minus": {"run": "D"}},
    ]
    experiment = replace(spec.read_experiment("table4", "quick"), claims=claims)
    monkeypatch.setattr(spec, "read_experiment", lambda name, scale: experiment)
    monkeypatch.setattr(spec, "experiment_names", lambda: ["fig8", "table4"])  # fig8 was not run
    result = run_script("experiments.page", tmp_path)
    assert result.code == 0, result.err
    page = (tmp_path / "README.md").read_text()
    assert "2 claims: 1 seen, 0 contradicted, 0 not decided, 1 not run" in page
    assert "2.93 (above 0)" in page and "1 [0.752, 1.25]" in page and "**seen**" in page
    texts = (
        "A is better",
        "late †",
        "beside the point ‡",
        "of ours",
        ": control",
        "**contradicted**",
        "On ten images.",
    )
    assert "**not decided** (7 seeds)" in page
    assert re.search(r"one seed .* 1 \| \*\*not decided\*\* +\|", page)
    section = ("## table4", "*Claim:*", "*Picture:*", "*Found:* A is right of B.", "62.00 ±")
    order = [page.index(text) for text in (*texts, *section)]
    assert order == sorted(order)
    assert re.search(r"\| A +\| +3 \| 62.00 ± .* \| +70.00 \|", page)
    assert "![table4](table4.png)" in page and (tmp_path / "table4.png").exists()
