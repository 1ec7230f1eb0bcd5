"""The speed page: rates, table and picture from results."""

import shutil

from conftest import ROOT

RESULTS = ROOT / "docs" / "results" / "speed" / "results.json"


def test_table_and_picture_come_from_the_results(run_script, tmp_path):
    shutil.copy(RESULTS, tmp_path)
    redraw = ("benchmarks.speed", "--output", tmp_path, "--redraw")
    redrawn = run_script(*redraw)
    assert redrawn.code == 0, redrawn.err
    table = (tmp_path / "table.md").read_text()
    cells = ("step", "bfloat16, compiled", "8", "3.9", "10.7 (10.6 to 11.0)", "2.75")
    assert " | ".join((*cells, "36.5 of 190.1")) in " ".join(table.split())
    assert "764.7 (750.5 to 768.9) | 2.263 |" in table
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text("{}")
    run_script(*redraw).assert_one_sentence("missing or damaged", "--redraw")
    nowhere = ("benchmarks.speed", "--output", tmp_path / "none")
    run_script(*nowhere).assert_one_sentence("there is no folder", "make it first")
