"""The prompt: lines with history, search, several lines a message, and completion of commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from llmkit_chat.repl import COMMANDS, SETTINGS

if TYPE_CHECKING:
    from prompt_toolkit.key_binding.key_bindings import NotImplementedOrNone


def reader() -> Callable[[], str]:
    """A function that reads one message. It raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C on an empty line."""
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history_file())),
        multiline=True,
        key_bindings=key_bindings(),
        completer=CommandCompleter(),
        enable_open_in_editor=True,  # Ctrl-X Ctrl-E
        prompt_continuation=lambda width, number, wrapped: " " * width,
        reserve_space_for_menu=4,
    )
    return lambda: session.prompt(FormattedText([("bold ansigreen", "> ")]))


def history_file() -> Path:
    """Where messages are kept between sessions: readable by their user alone."""
    path = platformdirs.user_state_path("llmkit") / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    return path


def key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> NotImplementedOrNone | None:
        event.current_buffer.validate_and_handle()
        return None

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings


class CommandCompleter(Completer):
    """Completes /commands, the settings of /set and the files of /save and /load."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            yield from _matching(COMMANDS, command)
        elif command == "/set" and " " not in argument:
            yield from _matching(SETTINGS, argument)
        elif command in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)


def _matching(words: Iterable[str], start: str) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(start)) for word in words if word.startswith(start))
