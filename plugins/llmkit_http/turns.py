"""Turn: a conversation made ready for the engine - the prompt, the constraint of the answer, and how to read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from llmkit.chat import PLAIN_STOPS, encode_chat
from llmkit_http.errors import bad_request
from llmkit_http.models import Model
from llmkit_http.prompts import encode
from llmkit_http.tools import Parser, PlainParser, ToolParser, knows_tools, spell_out

if TYPE_CHECKING:
    from llmkit.engine import Constraint

AUTO, REQUIRED, NONE = "auto", "required", "none"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What the answer is to be: /v1/chat/completions and /v1/responses say it in forms of their own.

    `messages` are as chat templates take them, content as text; `tools` have name, description and parameters;
    `choice` is auto, required or none; `schema` what the answer's text must follow, None for free text.
    `format_param` and `tools_param` name them in errors.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str = AUTO
    several_calls: bool = True
    schema: Mapping[str, Any] | None = None
    param: str = "messages"
    format_param: str = "response_format"
    extra_stops: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Turn:
    """The prompt, and for each generation a constraint and a parser."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...]
    constraint: Callable[[], Constraint] | None
    parser: Callable[[], Parser]

    @classmethod
    async def prepare(cls, model: Model, said: Conversation) -> Turn:
        """Render the conversation and compile the constraint. Raises APIError."""
        tools = () if said.choice == NONE else said.tools
        if said.choice == REQUIRED and not tools:
            raise bad_request("tool_choice: it asks for a call, but there are no tools to call", "tool_choice")
        template = model.checkpoint.chat_template
        native = knows_tools(template)
        messages = said.messages if native else spell_out(said.messages, tools)
        shown = [{"type": "function", "function": tool} for tool in tools] if native and tools else None

        def how(_: str) -> list[int]:
            return encode_chat(model.checkpoint, messages, tools=shown, plain=True)

        text = "".join(message["content"] for message in messages)  # for its length
        prompt = await encode(model, text, said.param, how)
        constraint = None
        if tools or said.schema is not None:
            constraint = await asyncio.to_thread(_constraint, model, said, tools)
        stops = (*said.extra_stops, *(() if template else PLAIN_STOPS))
        return cls(prompt, stops, constraint, ToolParser if tools else PlainParser)


def _constraint(
    model: Model, said: Conversation, tools: Sequence[Mapping[str, Any]]
) -> Callable[[], Constraint] | None:
    """Makes the constraint of each generation. Raises APIError where the engine has none, and for a bad schema."""
    from llmkit_http.constraints import answer_grammar, names_of, tool_grammar

    required = said.choice == REQUIRED
    param = "tools" if tools else said.format_param
    if not model.engine.can_constrain:
        if tools and not required and said.schema is None:
            return None  # the model may still call, in a form that nothing ensures
        raise bad_request(f"{param}: engine {model.engine.name!r} cannot hold an answer to a format", param)
    if tools:
        grammar = tool_grammar(names_of(tools), required=required, several=said.several_calls, schema=said.schema)
    else:
        assert said.schema is not None
        grammar = answer_grammar(said.schema)
    model.grammars.check(grammar, param)
    return partial(model.grammars.constraint, grammar)
