"""The CSV of an experiment, which the measures write and the drawings read."""

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoint.files import atomic_write
from utils.run.errors import UserError


class Row(dict[str, str]):
    """Column -> text; asked for a column that the CSV lacks, it raises UserError."""

    def __missing__(self, column: str):
        raise UserError(f"the CSV has no column {column!r}: measure this table or figure again")


class Table(list[Row]):
    """The rows of a CSV, or some of them."""

    def where(self, **values: str) -> "Table":
        """The rows that have these values."""
        return Table(row for row in self if all(row[c] == value for c, value in values.items()))

    def distinct(self, column: str) -> list[str]:
        """Its values, in order of first appearance."""
        return list(dict.fromkeys(row[column] for row in self))

    def split(self, column: str) -> dict[str, "Table"]:
        """The rows of each of its values."""
        return {value: self.where(**{column: value}) for value in self.distinct(column)}

    def numbers(self, column: str) -> np.ndarray:
        """Its values, without empty cells."""
        return np.array([float(row[column]) for row in self if row[column]])


def as_text(value: Any) -> Any:
    """A cell: six digits of a float, which no measure here is more exact than."""
    return f"{value:.6g}" if isinstance(value, float) else value


def read_table(path: Path) -> Table:
    """Raises UserError for a file that cannot be read."""
    try:
        with path.open(newline="") as file:
            return Table(map(Row, csv.DictReader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def write_table(path: Path, rows: Collection[Mapping[str, Any]]) -> None:
    """Write rows under the columns that any of them has, in order of first appearance."""
    rows = [{name: as_text(value) for name, value in row.items()} for row in rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))
