"""What an answer looks like in a terminal: Markdown that is drawn while it grows."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, SegmentLines
from rich.spinner import Spinner

from llmkit.cli.ui import printable

FRAMES_PER_SECOND = 12


class MarkdownStream:
    """Draws growing Markdown. Blocks that are finished are printed; only the last one, still growing, is redrawn.

    So an answer can be longer than the window and stays in the scrollback. A last block that is higher than the window
    shows its end until it is finished. All is drawn by the thread that calls `add`: rich can mistake the place where it
    has to draw when another thread prints in between.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail, self._printed = "", False
        self._spinner = Spinner("dots", style="dim")
        self._live = Live(self, console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._print(self._tail)

    def add(self, text: str) -> None:
        """Draw more text, or with none the next picture of the spinner; at most some times a second."""
        self._tail += printable(text)
        if "\n" in text:
            finished, self._tail = split_finished(self._tail)
            self._print(finished)
        if time.monotonic() - self._drawn > 1 / FRAMES_PER_SECOND:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _print(self, markdown: str) -> None:
        if lines := self._lines(markdown, self._console.options):
            self._printed = True
            self._console.print(SegmentLines(lines, new_lines=True), end="")

    def _lines(self, markdown: str, options: ConsoleOptions) -> list[list[Segment]]:
        """Rendered lines, with one empty line in front unless they are the first, whatever rich puts around blocks."""
        lines = self._console.render_lines(as_markdown(markdown), options.update(height=None), pad=False)
        filled = [index for index, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
        if not filled:
            return []
        return [*([[]] if self._printed else []), *lines[filled[0] : filled[-1] + 1]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self._lines(self._tail, options)
        if lines:
            yield SegmentLines(lines[-max(options.size.height - 3, 1) :], new_lines=True)
        else:
            yield self._spinner


def as_markdown(text: str) -> Markdown:
    return Markdown(text, code_theme="ansi_dark", inline_code_theme="ansi_dark")


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
