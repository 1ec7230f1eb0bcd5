"""Tables for pages and terminals."""

from collections.abc import Sequence


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the header; Markdown, so that it can be pasted into a page as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    for row in (rows[0], rule, *rows[1:]):
        print("| " + " | ".join(map(str.rjust, row, widths)) + " |")
