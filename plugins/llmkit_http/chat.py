"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from llmkit_http.chat_schemas import (
    AnswerCall,
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ContentLogprob,
    FunctionCall,
    NamedTool,
    Reason,
    ResponseFormat,
    TopLogprob,
)
from llmkit_http.errors import bad_request
from llmkit_http.jobs import Job, Piece, TokenLogprob
from llmkit_http.limits import warning_header
from llmkit_http.models import Model
from llmkit_http.schemas import ERRORS, Usage
from llmkit_http.service import FINGERPRINT, service
from llmkit_http.sse import ChunkEvents, EventStream, unless_gone
from llmkit_http.text import token_bytes, token_text
from llmkit_http.tools import CallArguments, CallBegin, Delta, TextDelta
from llmkit_http.turns import ANY_OBJECT, AUTO, REQUIRED, Conversation, Turn

router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"], summary="Answer a conversation")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    at = service(request)
    model = at.models.find(body.model)
    n = at.check_n(body.n)
    turn = await Turn.prepare(model, _conversation(body))
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted is not None:
        at.check_max_tokens(wanted, "max_tokens")
    sampling = body.sampling(
        max_tokens=wanted or at.options.max_tokens or model.engine.context_length,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    job = at.job(model, [turn.prompt], sampling, stop=turn.stops, n=n, constraint=turn.constraint)
    answer = _Answer(model, body, job, turn)
    headers = warning_header(body.model_extra or {})
    if body.stream:
        return EventStream(answer.events(), job.cancel, headers)
    samples = await unless_gone(request, job.result())
    return Response(answer.whole(samples).model_dump_json(), media_type="application/json", headers=headers)


def _conversation(body: ChatRequest) -> Conversation:
    """The request in the terms of `Turn`. Raises APIError."""
    tools = [
        tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        for tool in body.tools or ()
    ]
    choice = body.tool_choice or AUTO
    if isinstance(choice, NamedTool):
        named = choice.function.name
        tools = [tool for tool in tools if tool["name"] == named]
        if not tools:
            raise bad_request(f"tool_choice: there is no tool {named[:80]!r}", "tool_choice")
        choice = REQUIRED
    return Conversation(
        messages=[read_message(message, index) for index, message in enumerate(body.messages)],
        tools=tools,
        choice=choice,
        several_calls=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool),
        schema=_schema(body.response_format),
        extra_stops=body.stop_strings(),
    )


def read_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as templates take it, its content one text. Raises APIError for content that is not text."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise bad_request(f"messages[{index}]: content of type {part.type[:40]!r} is not supported", "messages")
        content = "".join(part.text or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    calls = [
        {"type": "function", "function": {"name": call.function.name, "arguments": parsed(call.function.arguments)}}
        for call in message.tool_calls or ()
    ]
    return {"role": role, "content": content or "", **({"tool_calls": calls} if calls else {})}


def parsed(arguments: str) -> Any:
    """The arguments of a call as templates want them: parsed, or the text where it is no JSON."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _schema(wanted: ResponseFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None:
        raise bad_request("response_format: json_schema is missing", "response_format")
    return wanted.json_schema.schema_ or ANY_OBJECT


class _Answer:
    """Turns the pieces of a job into the answer, whole or as events."""

    def __init__(self, model: Model, body: ChatRequest, job: Job, turn: Turn) -> None:
        self._body, self._job, self._turn = body, job, turn
        self._tokenizer = model.checkpoint.tokenizer
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = body.model or model.names[0]

    def _usage(self) -> Usage:
        return Usage.of(self._job.prompt_tokens, self._job.completion_tokens)

    def whole(self, samples: list[list[Piece]]) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(pieces) for pieces in samples],
            usage=self._usage(),
            system_fingerprint=FINGERPRINT,
        )

    def _choice(self, pieces: list[Piece]) -> ChatChoice:
        parser = self._turn.parser()
        deltas: list[Delta] = []
        for piece in pieces:
            deltas += parser.feed(piece.text)
        deltas += parser.finish()
        text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        calls: list[AnswerCall] = []
        for delta in deltas:
            if isinstance(delta, CallBegin):
                calls.append(AnswerCall(id=delta.id, function=FunctionCall(name=delta.name, arguments="")))
            elif isinstance(delta, CallArguments):
                calls[-1].function.arguments += delta.text
        logprobs = None
        if self._body.logprobs:
            entries = [entry for piece in pieces for entry in piece.logprobs]
            logprobs = ChatLogprobs(content=[self._entry(entry) for entry in entries])
        return ChatChoice(
            index=pieces[0].index,
            message=AnswerMessage(content=text if text or not calls else None, tool_calls=calls or None),
            logprobs=logprobs,
            finish_reason=self._reason(pieces[-1], bool(calls)),
        )

    def _reason(self, last: Piece, called: bool) -> Reason:
        if last.finish_reason == "length":
            return "length"
        # OpenAI's API: "tool_calls" is a choice of the model's, so a call of the function that was named is a "stop".
        return "tool_calls" if called and not isinstance(self._body.tool_choice, NamedTool) else "stop"

    def _entry(self, entry: TokenLogprob) -> ContentLogprob:
        top = [self._token(index, value) for index, value in entry.top.items()]
        assert entry.logprob is not None
        chosen = self._token(entry.id, entry.logprob)
        return ContentLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)

    def _token(self, token: int, logprob: float) -> TopLogprob:
        data = token_bytes(self._tokenizer, token)
        return TopLogprob(token=token_text(self._tokenizer, token), logprob=logprob, bytes=list(data))

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        base = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
        }
        chunks = ChunkEvents(base, self._body.stream_options)

        def event(index: int, delta: str, logprobs: str = "null", reason: str = "null") -> bytes:
            return chunks.choice(index, delta=delta, logprobs=logprobs, finish_reason=reason)

        parsers = [self._turn.parser() for _ in self._job.samples]
        called = [False] * len(parsers)
        yield b"".join(event(index, '{"role": "assistant", "content": ""}') for index in range(len(parsers)))
        async for pieces in self._job.pieces():
            events = []
            for piece in pieces:
                index = piece.index
                deltas = parsers[index].feed(piece.text)
                if piece.finish_reason:
                    deltas += parsers[index].finish()
                logprobs = "null"
                if piece.logprobs:
                    logprobs = ChatLogprobs(content=[self._entry(entry) for entry in piece.logprobs]).model_dump_json()
                    deltas = deltas or [TextDelta("")]
                for delta in deltas:
                    called[index] |= isinstance(delta, CallBegin)
                    events.append(event(index, delta.chat_json(), logprobs))
                    logprobs = "null"
                if piece.finish_reason:
                    events.append(event(index, "{}", reason=f'"{self._reason(piece, called[index])}"'))
            if events:
                yield b"".join(events)
        yield chunks.end(self._usage())
