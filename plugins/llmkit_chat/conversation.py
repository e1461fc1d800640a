"""Conversation: the messages so far, and the JSON file that they are saved in.

The file holds what a chat completion request holds, `{"model": …, "messages": [{"role": …, "content": …}, …]}`, so that
other programs read it and theirs are read here. The web page exports the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from llmkit.files import write_json

ROLES = ("system", "user", "assistant")


@dataclass
class Conversation:
    """A system message, or None, and the turns after it; the last one may be a user's that has no answer yet."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def ask(self, text: str) -> None:
        """Add a user's message; it takes the place of one that was never answered."""
        self.forget_answer(only_if_missing=True)
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the assistant's answer, or more of the one that is there."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            text = self.turns.pop()["content"] + text
        self.turns.append({"role": "assistant", "content": text})

    def forget_answer(self, *, only_if_missing: bool = False) -> str | None:
        """Take the last user's message out, and its answer; the message, or None where there is none.

        With `only_if_missing`, nothing happens unless the answer is missing.
        """
        if not self.turns or (only_if_missing and self.turns[-1]["role"] != "user"):
            return None
        if self.turns[-1]["role"] == "assistant":
            if len(self.turns) < 2:  # a loaded conversation may begin with the assistant
                return None
            self.turns.pop()
        return self.turns.pop()["content"]

    def save(self, path: Path, model: str) -> None:
        """Write the file, whole or not at all."""
        write_json(path, {"model": model, "messages": self.messages})

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read a file that `save` wrote, or a bare list of messages. Raises ValueError, naming what is wrong in it."""
        try:
            value = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise ValueError(f"{path} is no conversation: it has no list of messages")
        conversation = cls()
        for number, message in enumerate(messages, start=1):
            problem = _problem(message, conversation)
            if problem:
                raise ValueError(f"{path}: message {number} {problem}")
            if message["role"] == "system":
                conversation.system = message["content"]
            else:
                conversation.turns.append({"role": message["role"], "content": message["content"]})
        return conversation


def _problem(message: object, before: Conversation) -> str | None:
    """What is wrong with a message that follows `before`, or None."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return "has no role or no content"
    role, content = message["role"], message["content"]
    if role not in ROLES:
        return f"has the role {role!r}; there are: {', '.join(ROLES)}"
    if not isinstance(content, str):
        return "has a content that is not text"
    if role == "system":
        return "is a system message, but not the first" if before.messages else None
    if before.turns and before.turns[-1]["role"] == role:
        return f"is the second in a row of role {role!r}"
    return None
