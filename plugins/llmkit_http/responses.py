"""/v1/responses: a conversation's next items. Nothing is stored, so each request brings the whole conversation."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from llmkit.engine import Sampling
from llmkit_http.chat import parsed
from llmkit_http.errors import as_api_error, bad_request
from llmkit_http.jobs import Job
from llmkit_http.limits import warning_header
from llmkit_http.models import Model
from llmkit_http.response_schemas import (
    IncompleteDetails,
    InputItem,
    InputPart,
    OutputCall,
    OutputMessage,
    OutputText,
    ResponseNamedTool,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    TextFormat,
)
from llmkit_http.schemas import ERRORS
from llmkit_http.service import service
from llmkit_http.sse import EventStream, unless_gone
from llmkit_http.tools import CallArguments, CallBegin, Delta, TextDelta
from llmkit_http.turns import ANY_OBJECT, AUTO, REQUIRED, Conversation, Turn

router = APIRouter(responses=ERRORS)


@router.post("/v1/responses", response_model=ResponseObject, tags=["OpenAI"], summary="Answer a conversation, as items")
async def create_response(body: ResponseRequest, request: Request) -> Response:
    at = service(request)
    model = at.models.find(body.model)
    for name in ("previous_response_id", "background"):
        if getattr(body, name):
            raise bad_request(f"{name}: nothing is stored here, so send the whole conversation as input", name)
    turn = await Turn.prepare(model, _conversation(body))
    if body.max_output_tokens is not None:
        at.check_max_tokens(body.max_output_tokens, "max_output_tokens")
    sampling = Sampling(
        max_tokens=body.max_output_tokens or at.options.max_tokens or model.engine.context_length,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
    )
    job = at.job(model, [turn.prompt], sampling, stop=turn.stops, constraint=turn.constraint)
    answer = _Answer(model, body, job, turn)
    headers = warning_header(body.model_extra or {})
    if body.stream:
        return EventStream(answer.events(), job.cancel, headers)
    await unless_gone(request, answer.run())
    return Response(answer.object().model_dump_json(), media_type="application/json", headers=headers)


def _conversation(body: ResponseRequest) -> Conversation:
    """The request in the terms of `Turn`. Raises APIError."""
    items = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    for index, item in enumerate(items):
        _add_item(messages, item, index)
    if not messages:
        raise bad_request("input: it is empty", "input")
    tools = [
        tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True) for tool in body.tools or ()
    ]
    choice = body.tool_choice or AUTO
    if isinstance(choice, ResponseNamedTool):
        tools = [tool for tool in tools if tool["name"] == choice.name]
        if not tools:
            raise bad_request(f"tool_choice: there is no tool {choice.name[:80]!r}", "tool_choice")
        choice = REQUIRED
    return Conversation(
        messages=messages,
        tools=tools,
        choice=choice,
        several_calls=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, ResponseNamedTool),
        schema=_schema(body.text.format if body.text else None),
        param="input",
        format_param="text",
    )


def _add_item(messages: list[dict[str, Any]], item: InputItem, index: int) -> None:
    """Put an item behind the messages; calls belong to the assistant's message before them."""
    if item.type == "message" and item.role is not None:
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text(item.content, index)})
    elif item.type == "function_call" and item.name is not None:
        call = {"type": "function", "function": {"name": item.name, "arguments": parsed(item.arguments or "{}")}}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif item.type == "function_call_output":
        messages.append({"role": "tool", "content": _text(item.output, index)})
    else:
        raise bad_request(f"input[{index}]: an item of type {item.type[:40]!r} like this is not supported", "input")


def _text(content: str | list[InputPart] | None, index: int) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise bad_request(f"input[{index}]: content of type {part.type[:40]!r} is not supported", "input")
    return "".join(part.text or "" for part in content)


def _schema(wanted: TextFormat | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    return (wanted.schema_ or ANY_OBJECT) if wanted.type == "json_schema" else ANY_OBJECT


class _Answer:
    """Collects the items of an answer, and says of each step what streaming clients are told."""

    def __init__(self, model: Model, body: ResponseRequest, job: Job, turn: Turn) -> None:
        self._body, self._job = body, job
        self._parser = turn.parser()
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = body.model or model.names[0]
        self._items: list[OutputMessage | OutputCall] = []
        self._finish: str | None = None
        self._sequence = 0

    def object(self) -> ResponseObject:
        """The answer as it is now."""
        body = self._body
        status = {None: "in_progress", "length": "incomplete"}.get(self._finish, "completed")
        usage = None
        if self._finish:
            read, written = self._job.prompt_tokens, self._job.completion_tokens
            usage = ResponseUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        choice = body.tool_choice
        wanted = body.text.format if body.text and body.text.format else TextFormat(schema=None)
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,  # type: ignore[arg-type]
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=self._model,
            output=self._items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": wanted.model_dump(by_alias=True, exclude_none=True)},
            tool_choice=choice.model_dump() if isinstance(choice, ResponseNamedTool) else choice or AUTO,
            tools=[tool.model_dump() for tool in body.tools or ()],
            top_p=body.top_p or 1.0,
            usage=usage,
        )

    async def run(self) -> None:
        """Generate the whole answer. Raises APIError."""
        async for _ in self._steps():
            pass

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, with an `error` event where it fails on the way."""
        yield self._whole_event("created") + self._whole_event("in_progress")
        try:
            async for events in self._steps():
                yield b"".join(events)
        except Exception as error:
            failed = as_api_error(error)
            yield self._event("error", code=failed.code, message=failed.message, param=failed.param)
            raise
        yield self._whole_event("incomplete" if self._finish == "length" else "completed")

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode()

    def _whole_event(self, kind: str) -> bytes:
        return self._event(f"response.{kind}", response=self.object().model_dump(mode="json"))

    async def _steps(self) -> AsyncIterator[list[bytes]]:
        """The events of each step of the generation, after taking note of what it gave."""
        async for pieces in self._job.pieces():
            events: list[bytes] = []
            for piece in pieces:
                deltas = self._parser.feed(piece.text)
                if piece.finish_reason:
                    deltas += self._parser.finish()
                for delta in deltas:
                    events += self._add(delta)
                if piece.finish_reason:
                    if not self._items:  # an answer without a token is an empty message
                        events += self._begin_message()
                    self._finish = piece.finish_reason
                    events += self._end_item("incomplete" if piece.finish_reason == "length" else "completed")
            yield events

    def _add(self, delta: Delta) -> list[bytes]:
        events: list[bytes] = []
        last = self._items[-1] if self._items else None
        if isinstance(delta, CallBegin):
            events += self._end_item("completed")
            item = OutputCall(
                id=f"fc_{secrets.token_hex(16)}",
                call_id=delta.id,
                name=delta.name,
                arguments="",
                status="in_progress",
            )
            self._items.append(item)
            events.append(self._item_event("added", item))
        elif isinstance(delta, CallArguments):
            assert isinstance(last, OutputCall)
            last.arguments += delta.text
            events.append(self._at("response.function_call_arguments.delta", delta=delta.text))
        elif isinstance(delta, TextDelta):
            if not isinstance(last, OutputMessage):
                events += self._end_item("completed")
                events += self._begin_message()
                last = self._items[-1]
            assert isinstance(last, OutputMessage)
            last.content[0].text += delta.text
            events.append(self._at("response.output_text.delta", content_index=0, delta=delta.text, logprobs=[]))
        return events

    def _begin_message(self) -> list[bytes]:
        item = OutputMessage(id=f"msg_{secrets.token_hex(16)}", status="in_progress", content=[])
        self._items.append(item)
        added = self._item_event("added", item)
        item.content.append(OutputText(text=""))
        return [added, self._at("response.content_part.added", content_index=0, part=item.content[0].model_dump())]

    def _end_item(self, status: Any) -> list[bytes]:
        """Close the last item, if there is one that is open."""
        if not self._items or self._items[-1].status != "in_progress":
            return []
        item = self._items[-1]
        item.status = status
        if isinstance(item, OutputCall):
            done = [self._at("response.function_call_arguments.done", name=item.name, arguments=item.arguments)]
        else:
            part = item.content[0]
            done = [
                self._at("response.output_text.done", content_index=0, text=part.text, logprobs=[]),
                self._at("response.content_part.done", content_index=0, part=part.model_dump()),
            ]
        return [*done, self._item_event("done", item)]

    def _at(self, kind: str, **fields: Any) -> bytes:
        """An event about the last item."""
        return self._event(kind, item_id=self._items[-1].id, output_index=len(self._items) - 1, **fields)

    def _item_event(self, what: str, item: OutputMessage | OutputCall) -> bytes:
        index = len(self._items) - 1
        return self._event(f"response.output_item.{what}", output_index=index, item=item.model_dump(mode="json"))
