"""Markdown that reports are written in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    """A table, with the columns whose index is in `right` aligned there; bars in cells are escaped."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(" ---: " if i in right else " --- " for i in range(len(columns))) + "|"
    return "\n".join([line(columns), rule, *(line(row) for row in rows)])
