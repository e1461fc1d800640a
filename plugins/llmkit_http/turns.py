"""Turn: a conversation made ready for the engine - the prompt, the constraint of the answer, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.chat import PLAIN_STOPS, encode_chat
from llmkit.engine import FinishReason, Sampling
from llmkit_http.chat_schemas import ChatMessage, ChatRequest, Reason
from llmkit_http.errors import bad_request
from llmkit_http.models import Model
from llmkit_http.prompts import encode
from llmkit_http.tools import PlainParser

if TYPE_CHECKING:
    from llmkit.engine import Constraint


@dataclass(frozen=True)
class Turn:
    """What generating the next message of a conversation takes."""

    model: Model
    prompt: tuple[int, ...]
    constraint: Callable[[], Constraint] | None = None

    @classmethod
    async def prepare(cls, model: Model, body: ChatRequest) -> Turn:
        """Render and check. Raises APIError."""
        messages = [_plain(message, index) for index, message in enumerate(body.messages)]

        def how(_: str) -> list[int]:
            return encode_chat(model.checkpoint, messages, plain=True)

        text = "".join(message["content"] for message in messages)  # for its length
        return cls(model, await encode(model, text, "messages", how))

    def adjust(self, sampling: Sampling) -> Sampling:
        return sampling

    def stops(self, stops: Sequence[str]) -> list[str]:
        """The stop strings asked for, and those of the plain template."""
        return [*stops, *(() if self.model.checkpoint.chat_template else PLAIN_STOPS)]

    def parser(self) -> PlainParser:
        return PlainParser()

    def finish_reason(self, reason: FinishReason | None, called: bool) -> Reason:
        """The reason in OpenAI's terms."""
        return "length" if reason == "length" else "tool_calls" if called else "stop"


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as templates take it, its content one text. Raises APIError for content that is not text."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise bad_request(f"messages[{index}]: content of type {part.type[:40]!r} is not supported", "messages")
        content = "".join(part.text or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content or ""}
