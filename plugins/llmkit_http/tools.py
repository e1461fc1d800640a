"""Tool calls in a model's text: found as it comes, and handed on in the parts that clients expect.

The form is that of Hermes, which many models know: <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=[\[{])')
LONGEST_HEAD = 400  # characters; what is longer and still no head is none

INSTRUCTIONS = """\
You can call functions. To call one, write its name and its arguments as JSON, in this form:
<tool_call>
{"name": "function name", "arguments": {"argument": "value"}}
</tool_call>
What a function returns comes in the next message, as <tool_response>. The functions are:
"""


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
        call = {"index": self.index, "id": self.id, "type": "function", "function": function}
        return json.dumps({"tool_calls": [call]})


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call number `index`, a part of a JSON text."""

    index: int
    text: str

    def chat_json(self) -> str:
        return json.dumps({"tool_calls": [{"index": self.index, "function": {"arguments": self.text}}]})


Delta = TextDelta | CallBegin | CallArguments


class Parser(Protocol):
    """Reads the text of one answer as it comes."""

    def feed(self, text: str) -> list[Delta]:
        """What more text of the answer adds."""

    def finish(self) -> list[Delta]:
        """What was held back."""


class PlainParser:
    """For answers that hold no calls."""

    def feed(self, text: str) -> list[Delta]:
        return [TextDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class ToolParser:
    """Finds calls. Text that only looks like one at first, or is no JSON, stays text."""

    def __init__(self) -> None:
        self._held = ""  # not decided yet
        self._state = "text"  # or head, arguments, tail: where in a call
        self._calls = 0
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        held, state, self._held = self._held, self._state, ""
        if state == "head":
            return [TextDelta(CALL_BEGIN + held)]
        return [TextDelta(held)] if state == "text" and held and (held.strip() or not self._calls) else []

    def _step(self, deltas: list[Delta]) -> bool:
        """Go on as far as the text leads into the next state; whether that may lead further."""
        return {"text": self._text, "head": self._head, "arguments": self._arguments, "tail": self._tail}[self._state](
            deltas
        )

    def _text(self, deltas: list[Delta]) -> bool:
        before, found, after = self._held.partition(CALL_BEGIN)
        if found:
            if before.strip():
                deltas.append(TextDelta(before.rstrip()))
            self._held, self._state = after, "head"
            return True
        end = len(self._held)
        for length in range(min(len(CALL_BEGIN) - 1, end), 0, -1):
            if self._held.endswith(CALL_BEGIN[:length]):
                end -= length
                break
        end = len(self._held[:end].rstrip())  # white space in front of a call is none of the answer's
        if end:
            deltas.append(TextDelta(self._held[:end]))
        self._held = self._held[end:]
        return False

    def _head(self, deltas: list[Delta]) -> bool:
        match = HEAD.match(self._held)
        if match and (name := _string(match[1])) is not None:
            deltas.append(CallBegin(self._calls, f"call_{secrets.token_hex(12)}", name))
            self._held, self._state, self._depth = self._held[match.end() :], "arguments", 0
            return True
        if CALL_END in self._held or len(self._held) > LONGEST_HEAD:
            deltas.append(TextDelta(CALL_BEGIN))
            self._state = "text"
            return True
        return False

    def _arguments(self, deltas: list[Delta]) -> bool:
        for at, char in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    deltas.append(CallArguments(self._calls, self._held[: at + 1]))
                    self._held, self._state = self._held[at + 1 :], "tail"
                    self._calls += 1
                    return True
        if self._held:
            deltas.append(CallArguments(self._calls, self._held))
            self._held = ""
        return False

    def _tail(self, deltas: list[Delta]) -> bool:
        _, found, after = self._held.partition(CALL_END)
        if found:
            self._held, self._state = after, "text"
        return bool(found)


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model, and calls in the form that is read here."""
    return template is not None and "tools" in template and CALL_BEGIN in template


def spell_out(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with tools for a template that knows nothing of them: as text, the tools in the system message."""
    told = [_spell_message(message) for message in messages]
    if not tools:
        return told
    text = INSTRUCTIONS + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    if told and told[0]["role"] == "system":
        return [{"role": "system", "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _spell_message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        f"{CALL_BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CALL_END}"
        for call in message.get("tool_calls") or ()
    ]
    return {"role": message["role"], "content": "\n".join(([content] if content else []) + calls)}
