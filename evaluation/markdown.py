"""Tables as Markdown."""

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, without a newline at its end.

    Args:
        header: The titles of the columns.
        rows: One sequence for each row, with one cell for each column. Cells are written as `str` gives them.

    Raises:
        ValueError: If a row has more or fewer cells than `header` has titles.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"expected {len(header)} cells in each row, got {len(row)}: {list(row)}")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
