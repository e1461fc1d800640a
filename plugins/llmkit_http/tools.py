"""Tool calls in a model's text: found as it comes, and handed on in the parts that clients expect."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer."""

    text: str

    def chat_json(self) -> str:
        return f'{{"content": {json.dumps(self.text)}}}'


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins, the answer's number `index`."""

    index: int
    id: str
    name: str

    def chat_json(self) -> str:
        function = {"name": self.name, "arguments": ""}
        return json.dumps(
            {"tool_calls": [{"index": self.index, "id": self.id, "type": "function", "function": function}]}
        )


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call number `index`, a part of a JSON text."""

    index: int
    text: str

    def chat_json(self) -> str:
        return json.dumps({"tool_calls": [{"index": self.index, "function": {"arguments": self.text}}]})


Delta = TextDelta | CallBegin | CallArguments


class PlainParser:
    """For answers that hold no calls."""

    def feed(self, text: str) -> list[Delta]:
        """What more text of the answer adds."""
        return [TextDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """What was held back."""
        return []
