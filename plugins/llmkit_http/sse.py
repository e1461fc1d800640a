"""Server-sent events: EventStream, a response that ends its source when the client goes, and ChunkEvents, the form of
events that completions share; unless_gone waits for work likewise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmkit_http.errors import ClientGone, as_api_error
from llmkit_http.schemas import StreamOptions, Usage

DONE = b"data: [DONE]\n\n"
SEND_SECONDS = 60  # a client that takes nothing for so long is given up

T = TypeVar("T")


class ChunkEvents:
    """The events of a streamed completion. Written by hand: of all that one holds, few characters differ from the last.

    With `include_usage` every event has a field `usage`, which is null but in the event before the end.
    """

    def __init__(self, base: Mapping[str, Any], options: StreamOptions | None) -> None:
        """`base` has the fields that all events share."""
        self._base, self._usage = base, bool(options and options.include_usage)
        self._head = b"data: " + json.dumps(base)[:-1].encode() + b', "choices": [{"index": '
        self._tail = b"}]" + (b', "usage": null' if self._usage else b"") + b"}\n\n"

    def choice(self, index: int, **fields: str) -> bytes:
        """An event about one choice. The values of `fields` are JSON already."""
        rest = str(index) + "".join(f', "{name}": {value}' for name, value in fields.items())
        return self._head + rest.encode() + self._tail

    def end(self, usage: Usage) -> bytes:
        """What comes after all choices."""
        if not self._usage:
            return DONE
        last = {**self._base, "choices": [], "usage": usage.model_dump()}
        return b"data: " + json.dumps(last).encode() + b"\n\n" + DONE


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives. Cancels it and raises ClientGone when the client closes its connection before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()


class EventStream(Response):
    """Events, ready as bytes, sent as they come; an exception of their source becomes the last event."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], end: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        """`end` is called when nothing more is sent, even if nothing ever was."""
        # X-Accel-Buffering: a proxy such as nginx must not wait for more
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            gone.cancel()
            sending.cancel()
            self._end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            return  # the connection is cut, since the response is not complete
        except Exception as error:
            await send({"type": "http.response.body", "body": as_api_error(error).event(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
