"""The speed page: rates, table and picture from results, also from older ones."""

import json

import pytest

from scripts.benchmarks.speed import as_markdown, rates


def row(what: str = "step") -> dict:
    saved = {"saved for backward, MiB/image": {"reference": 4.0, "ours": 2.0}}
    return {
        "what": what,
        "case": "float32",
        "precision": "float32",
        "batch": 8,
        "seconds": {"reference": [4.0, 2.0, 1.0], "ours": [1.0, 2.0, 0.5]},
        "notes": saved if what == "step" else {},
    }


def results() -> dict:
    return {
        "date": "2026-01-01",
        "machine": "2 cores",
        "torch": "2",
        "network": "reactnet_a",
        "image_size": 224,
        "teacher": False,
        "rounds": 3,
        "rows": [row(), row("evaluation")],
        "loading": [
            {"what": "loader", "images": 64, "seconds": {"reference": [0.2], "other": [0.1]}}
        ],
    }


def test_rates_are_low_median_and_high():
    assert rates([4.0, 2.0, 1.0], 8) == (2.0, 4.0, 8.0)
    assert rates([1.0, 2.0, 0.5], 8) == (4.0, 8.0, 16.0)


@pytest.mark.parametrize("name", ["reference", "composed"])  # today's, and that of older results
def test_table_and_picture_come_from_the_results(run_script, tmp_path, name):
    content = json.dumps(results()).replace('"reference"', f'"{name}"')
    (tmp_path / "results.json").write_text(content)
    redraw = ("benchmarks.speed", "--output", tmp_path, "--redraw")
    redrawn = run_script(*redraw)
    assert redrawn.code == 0, redrawn.err
    table = (tmp_path / "table.md").read_text()
    assert table == as_markdown(json.loads(content))
    assert "8.0 (4.0 to 16.0)" in table and "2.00" in table
    assert "640.0 (640.0 to 640.0)" in table
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text("{}")
    run_script(*redraw).assert_one_sentence("missing or damaged", "--redraw")
