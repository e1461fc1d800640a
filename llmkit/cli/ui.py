"""What commands show: progress bars and notes on stderr, results on stdout. rich is imported when it draws."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unicodedata import category

import click

if TYPE_CHECKING:
    from rich.console import Console

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, for scripts.")


def console() -> Console:
    """A console on stderr. Piped, it prints plain lines at the width of an ordinary terminal."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def note(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """The result as one JSON object on stdout. Raises ValueError for NaN, which JSON does not have."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def table(columns: list[str], rows: list[list[str]], *, right: tuple[int, ...] = ()) -> None:
    """A plain table on stdout: left-aligned columns, except those whose index is in `right`."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


@contextlib.contextmanager
def progress(
    description: str, total: float | None, *, unit: str = "", initial: float = 0
) -> Iterator[Callable[..., None]]:
    """A progress bar with ETA on stderr. Yields `update(completed=None, *, advance=0, total=None, status="")`.

    `total` None draws a bar without an end; `unit` "B" shows sizes; `initial` was done before. Where stderr is no
    terminal, a line is printed every ten seconds instead.
    """
    if not sys.stderr.isatty():
        yield _plain_progress(description, total, initial)
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%" if total is not None else ""),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    ]
    if unit == "B":
        from rich.progress import DownloadColumn

        columns.insert(3, DownloadColumn())
    with Progress(*columns, console=console(), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, completed=int(initial), status="")

        def update(
            completed: float | None = None, *, advance: float = 0, total: float | None = None, status: str = ""
        ) -> None:
            fields = {"status": status} if status else {}
            bar.update(task, completed=completed, advance=advance or None, total=total, **fields)  # type: ignore[arg-type]

        yield update


def _plain_progress(description: str, total: float | None, initial: float) -> Callable[..., None]:
    """`update` for output that is not a terminal."""
    import time

    state = {"completed": initial, "total": total, "started": time.monotonic(), "last": time.monotonic()}

    def update(
        completed: float | None = None, *, advance: float = 0, total: float | None = None, status: str = ""
    ) -> None:
        state["completed"] = (state["completed"] or 0.0) + advance if completed is None else completed
        if total is not None:
            state["total"] = total
        now = time.monotonic()
        if now - (state["last"] or 0.0) < 10:
            return
        state["last"] = now
        done, end = state["completed"] or 0.0, state["total"]
        eta = ""
        if end and done > initial:
            left = (now - (state["started"] or 0.0)) * (end - done) / (done - initial)
            eta = f" {100 * done / end:.0f}%, eta {duration(left)}"
        note(f"{description}{eta}{': ' + status if status else ''}")

    return update


def printable(text: str) -> str:
    """A model's text without the control characters, which could change a terminal's settings."""
    return "".join(char for char in text if char in "\n\t" or category(char) != "Cc")


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`, `4000` -> `1:06:40`."""
    whole = round(max(seconds, 0))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
