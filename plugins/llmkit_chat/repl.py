"""Repl: the conversation in a terminal, one message or /command after the other."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from llmkit.cli.ui import printable
from llmkit.component import nearest
from llmkit_chat.answering import Interrupted, interruptible
from llmkit_chat.conversation import Conversation
from llmkit_chat.models import ChatModel, Parameters
from llmkit_chat.screen import MarkdownStream, as_markdown, keys_not_shown

if TYPE_CHECKING:
    from llmkit_chat.models import Part

#: command -> (argument, what it does)
COMMANDS = {
    "/system": ("[TEXT]", "Set the system message for what follows; alone, show it; `/system -` removes it."),
    "/set": ("[NAME VALUE]", "Set a sampling parameter, `default` to unset it; alone, show all."),
    "/retry": ("", "Answer the last message again."),
    "/more": ("", "Continue the text where it ended (base models)."),
    "/save": ("FILE", "Write the conversation as JSON."),
    "/load": ("FILE", "Go on from a saved conversation."),
    "/reset": ("", "Begin a new conversation; the system message stays."),
    "/help": ("", "Show this."),
    "/exit": ("", "Leave; so does Ctrl-D."),
}
KEYS = (
    ("Enter", "Send."),
    ("Alt-Enter, Ctrl-J", "New line. Pasted text keeps its lines."),
    ("Up, Ctrl-R", "Earlier messages, search in them."),
    ("Ctrl-C", "Stop the answer; at the prompt clear the line, twice leave."),
)
#: sampling parameters that /set takes, with their types
SETTINGS: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "max_tokens": int}


class Leave(Exception):
    """The user wants to leave."""


class Repl:
    """Talks with a model. What is said is in `conversation`, and in the file `save_to` after each answer."""

    def __init__(
        self,
        model: ChatModel,
        conversation: Conversation,
        parameters: Parameters,
        *,
        console: Console,
        plain: bool = False,
        save_to: Path | None = None,
    ) -> None:
        self.model, self.conversation, self.parameters = model, conversation, parameters
        self.plain = plain or model.completes or console.is_dumb_terminal
        self.save_to = save_to
        self._console = console

    def run(self, read: Callable[[], str]) -> None:
        """Read messages and answer them until the user leaves. `read` raises EOFError and KeyboardInterrupt."""
        warned = False
        while True:
            try:
                text = read().strip("\n")
            except EOFError:
                return
            except KeyboardInterrupt:
                if warned:
                    return
                warned = True
                self.note("Ctrl-C again, or Ctrl-D, leaves")
                continue
            warned = False
            try:
                self.submit(text)
            except Leave:
                return
            except (ValueError, OSError) as error:
                self._console.print(Text(_sentence(error), style="red"))

    def submit(self, text: str) -> None:
        """Answer a message or follow a command. Raises Leave, and ValueError or OSError with a line for the user."""
        if text.startswith("/"):
            self._command(text)
        elif text.strip():
            self.conversation.ask(text)
            self._answer()

    def note(self, line: str) -> None:
        self._console.print(Text(f"[{line}]", style="dim"))

    def greet(self) -> None:
        self._console.print(Text.assemble((self.model.name, "bold"), "  /help lists commands, Ctrl-D leaves"))
        if self.model.completes:
            self.note("your text is continued, each text by itself; /more goes on (a base model, or --complete)")
        if self.conversation.turns:
            self._show_conversation()

    # ---- answering

    def _answer(self, *, more: bool = False) -> None:
        """Stream the answer to the last message, or with `more` the continuation of the last text."""
        conversation = self.conversation
        prompt = "".join(turn["content"] for turn in conversation.turns[-2 if more else -1 :])

        def start(cancelled: Any) -> Any:
            if self.model.completes:
                return self.model.complete(prompt, self.parameters, cancelled)
            return self.model.reply(conversation.messages, self.parameters, cancelled)

        text, started, last = "", time.perf_counter(), None
        try:
            with keys_not_shown(), self._display() as show:
                for part in interruptible(start):
                    if part.notice:
                        self.note(part.notice)
                    text += part.text
                    show(part.text)
                    last = part if part.finish_reason else last
        except Interrupted:
            self.note("stopped")
        finally:
            if text:
                conversation.answer(text)
                if self.save_to:
                    conversation.save(self.save_to, self.model.name)
        if last:
            self.note(self._summary(last, time.perf_counter() - started))

    def _summary(self, last: Part, seconds: float) -> str:
        words = [f"{last.tokens} tokens, {last.tokens / seconds:.0f} tokens/s"] if last.tokens else []
        if last.finish_reason == "length":
            words.append("cut off by max_tokens or the end of the context")
        return "; ".join(words) or f"ended by {last.finish_reason}"

    def _display(self) -> _PlainStream | _MarkdownDisplay:
        return _PlainStream() if self.plain else _MarkdownDisplay(self._console)

    def _show_conversation(self) -> None:
        """The conversation as it looked when it was held."""
        for turn in self.conversation.turns:
            text = printable(turn["content"])
            if turn["role"] == "user":
                self._console.print(Text.assemble(("> ", "bold green"), text))
            else:
                self._console.print(Text(text) if self.plain else as_markdown(text))

    # ---- commands

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            raise ValueError(
                f"unknown command {name}: {nearest(name, COMMANDS)} (a message may begin with / after a space)"
            )
        getattr(self, "_do_" + name[1:])(argument.strip())

    def _do_system(self, text: str) -> None:
        if text and self.model.completes:
            raise ValueError("a text that is only continued has no system message")
        if text:
            self.conversation.system = None if text == "-" else text
        self.note(f"system message: {self.conversation.system or 'none'}")

    def _do_set(self, argument: str) -> None:
        if argument:
            self.parameters = changed(self.parameters, argument)
        given = self.parameters.given
        self.note(", ".join(f"{name} {given.get(name, 'default')}" for name in SETTINGS))

    def _do_retry(self, _: str) -> None:
        text = self.conversation.forget_answer()
        if text is None:
            raise ValueError("there is no message to answer again")
        self.conversation.ask(text)
        self._answer()

    def _do_more(self, _: str) -> None:
        if not self.model.completes:
            raise ValueError("/more continues a base model's text; a chat model goes on when you ask it to")
        if not self.conversation.turns:
            raise ValueError("there is no text to continue")
        self._answer(more=True)

    def _do_save(self, argument: str) -> None:
        path = _path(argument, "/save conversation.json")
        self.conversation.save(path, self.model.name)
        self.note(f"saved {_count(self.conversation)} in {path}")

    def _do_load(self, argument: str) -> None:
        path = _path(argument, "/load conversation.json")
        self.conversation = Conversation.load(path)
        self._show_conversation()
        self.note(f"loaded {_count(self.conversation)} from {path}")

    def _do_reset(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self.note("a new conversation")

    def _do_help(self, _: str) -> None:
        rows = [(f"{name} {argument}".strip(), what) for name, (argument, what) in COMMANDS.items()]
        width = max(len(left) for left, _ in [*rows, *KEYS])
        for left, what in [*rows, *KEYS]:
            self._console.print(Text.assemble((left.ljust(width), "bold"), "  ", what))

    def _do_exit(self, _: str) -> None:
        raise Leave


def changed(parameters: Parameters, setting: str) -> Parameters:
    """`parameters` after "temperature 0.2" or "temperature default". Raises ValueError for what is no such setting."""
    name, _, value = setting.replace("-", "_").partition(" ")
    if name not in SETTINGS:
        raise ValueError(f"unknown setting {name!r}: {nearest(name, SETTINGS)}")
    given = {key: other for key, other in parameters.given.items() if key != name}
    value = value.strip()
    if value != "default":
        try:
            given[name] = SETTINGS[name](value)
        except ValueError:
            kind = "a number" if SETTINGS[name] is float else "a whole number"
            raise ValueError(f"{name} needs {kind} or `default`, not {value!r}") from None
    result = dataclasses.replace(parameters, given=given)
    result.sampling(completes=False)  # checks the range
    return result


def _path(argument: str, example: str) -> Path:
    words = shlex.split(argument)
    if len(words) != 1:
        raise ValueError(f"name one file (in quotes if it has spaces), as in {example}")
    return Path(words[0]).expanduser()


def _count(conversation: Conversation) -> str:
    number = len(conversation.messages)
    return "1 message" if number == 1 else f"{number} messages"


def _sentence(error: Exception) -> str:
    from llmkit.cli.main import describe

    return describe(error)


class _PlainStream:
    """Shows text as it is, where Markdown would get in the way."""

    def __init__(self) -> None:
        self._end = ""

    def __enter__(self) -> Callable[[str], None]:
        return self._show

    def _show(self, text: str) -> None:
        text = printable(text)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._end = text[-1:] or self._end

    def __exit__(self, *_: object) -> None:
        if self._end != "\n":
            print(flush=True)


class _MarkdownDisplay:
    """Shows text as Markdown."""

    def __init__(self, console: Console) -> None:
        self._stream = MarkdownStream(console)

    def __enter__(self) -> Callable[[str], None]:
        self._stream.__enter__()
        return self._stream.add

    def __exit__(self, *_: object) -> None:
        self._stream.__exit__()
