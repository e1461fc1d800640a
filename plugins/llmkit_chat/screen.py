"""What an answer looks like in a terminal: Markdown that is drawn while it grows."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner

from llmkit.cli.ui import printable


class MarkdownStream:
    """Draws growing Markdown. Blocks that are finished are printed; only the last one, still growing, is redrawn.

    So an answer can be longer than the window and stays in the scrollback. A last block that is higher than the window
    shows its end until it is finished.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail, self._printed = "", False
        self._lock = threading.Lock()  # the display is redrawn by a thread of its own
        self._live = Live(self, console=console, refresh_per_second=12, transient=True)
        self._spinner = Spinner("dots", style="dim")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._tail.strip():
            self._print(self._tail)

    def add(self, text: str) -> None:
        with self._lock:
            self._tail += printable(text)
            finished, self._tail = split_finished(self._tail) if "\n" in text else ("", self._tail)
        if finished.strip():
            self._print(finished)

    def _print(self, markdown: str) -> None:
        if self._printed:
            self._console.print()
        self._printed = True
        self._console.print(as_markdown(markdown))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            tail = self._tail
        if not tail.strip():
            yield self._spinner
            return
        lines = console.render_lines(as_markdown(tail), options.update(height=None), pad=False)
        room = max(options.size.height - 3, 1)
        if self._printed:
            yield Segment.line()
        for line in lines[-room:]:
            yield from line
            yield Segment.line()


def as_markdown(text: str) -> Markdown:
    return Markdown(text.strip("\n"), code_theme="ansi_dark", inline_code_theme="ansi_dark")


def split_finished(text: str) -> tuple[str, str]:
    """(blocks that further text cannot change, the last block): Markdown cut before its last top-level block."""
    from markdown_it import MarkdownIt

    starts = [token.map[0] for token in MarkdownIt().enable("table").parse(text) if token.level == 0 and token.map]
    if not starts:
        return "", text
    lines = text.split("\n")  # as Markdown counts them; splitlines knows more ends of lines
    last = "\n".join(lines[starts[-1] :])
    return text[: len(text) - len(last)], last


@contextlib.contextmanager
def keys_not_shown() -> Iterator[None]:
    """What is typed while an answer is being drawn does not appear in it; it waits for the next prompt."""
    try:
        import termios
    except ImportError:  # not a POSIX system
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter for the next prompt
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
