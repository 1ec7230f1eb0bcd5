"""A page of results: a folder with `results.json`, and the table and the picture made of it."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure

from utils.run.command_line import Parser, markdown_table
from utils.run.errors import UserError


def add_output_options(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, help="folder for results, table and picture")
    parser.add_argument("--redraw", action="store_true", help="table and picture, nothing measured")


def write_page(
    arguments: argparse.Namespace,
    picture: str,
    measure: Callable[[argparse.Namespace], dict],
    as_markdown: Callable[[dict], str],
    draw: Callable[[dict], Figure],
) -> None:
    """Measure, unless with `--redraw`; print the table, and write all of it to `--output`.

    Raises:
        UserError: no such folder, or results to be redrawn that are missing or damaged.
    """
    folder = arguments.output
    if folder is None and not arguments.redraw:
        print(as_markdown(measure(arguments)))
        return
    if folder is None or not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it first, or pass another --output")
    path = folder / "results.json"
    if not arguments.redraw:
        path.write_text(json.dumps(measure(arguments), indent=1) + "\n")
    try:
        results = json.loads(path.read_text())
        text, figure = as_markdown(results), draw(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: leave --redraw out") from error
    (folder / "table.md").write_text(text)
    figure.savefig(folder / picture, dpi=120)
    print(text)


def table(rows: Iterable[dict[str, str]]) -> str:
    """A Markdown table of rows with the same columns, column -> cell."""
    rows = list(rows)
    return markdown_table([list(rows[0]), *(list(row.values()) for row in rows)])
