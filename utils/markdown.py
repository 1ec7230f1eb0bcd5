"""Tables for pages and terminals."""

from collections.abc import Sequence


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header; Markdown, so that it can be pasted into a page as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        "| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in (rows[0], rule, *rows[1:])
    )


def print_table(rows: Sequence[Sequence[str]]) -> None:
    print(as_table(rows))
