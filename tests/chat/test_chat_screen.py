"""What a growing answer leaves on a terminal: each line once, whatever the window and the pieces in which it comes."""

from __future__ import annotations

import io

import pyte
import pytest
from rich.console import Console

from llmkit_chat import screen
from llmkit_chat.screen import MarkdownStream

WIDTH = 40
CODE = "\n".join(f"line_{number}" for number in range(14))
ANSWER = f"One *para*.\n\n# Head\n\n```python\n{CODE}\n```\n\n- a\n- b\n\n1. c\n2. d\n\n\x1b[2Jbye"


class Terminal(io.StringIO):
    """A terminal that keeps what scrolls out of it."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(WIDTH, height, history=500)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    @property
    def text(self) -> str:
        scrolled = ["".join(line[column].data for column in range(WIDTH)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*scrolled, *self.screen.display]).rstrip()


@pytest.mark.parametrize("height", [6, 12, 60])
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_each_line_is_shown_once(height: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "FRAMES_PER_SECOND", float("inf"))
    terminal = Terminal(height)
    console = Console(file=terminal, force_terminal=True, width=WIDTH, height=height, color_system="truecolor")
    with MarkdownStream(console) as stream:
        for start in range(0, len(ANSWER), step):
            stream.add(ANSWER[start : start + step])
            stream.add("")
    shown = [line.strip(" │┏┓┗┛━┃") for line in terminal.text.split("\n")]
    assert [line for line in shown if line] == [
        *("One para.", "Head", *CODE.split("\n")),
        *("• a", "• b", "1 c", "2 d", "[2Jbye"),  # without the escape character, which could change the terminal
    ]
