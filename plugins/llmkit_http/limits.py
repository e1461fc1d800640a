"""Limits: the size of a body and how long it may take to come, and how many generations may wait or run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit_http.errors import APIError, bad_request

BODY_SECONDS = 60  # to receive a body, so that a client that sends a byte now and then does not hold a connection


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `limit` bytes, 408 for one that does not come."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = APIError(413, f"The body is larger than the {self.limit} bytes that this server takes.")
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value) > self.limit):
                await too_large.response()(scope, receive, send)
                return
        size, complete = 0, False
        deadline = time.monotonic() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is the end of the connection, whenever that is
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise APIError(408, f"The body did not come within {BODY_SECONDS} seconds.") from None
            size += len(message.get("body", b""))
            if size > self.limit:
                raise too_large
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)


class Admission:
    """Counts the generations in flight, and refuses those beyond `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._seconds = 1.0  # that a generation took of late, smoothed

    def enter(self, count: int) -> None:
        """Take `count` places. Raises APIError: 400 for more than there ever are, 429 for more than are free."""
        if count > self.limit:
            message = f"prompt: all prompts and their n make {count} generations, and {self.limit} are taken at once"
            raise bad_request(message, "prompt")
        if self.in_flight + count > self.limit:
            wait = str(min(30, max(1, round(self._seconds))))
            raise APIError(
                429,
                f"The server is busy with {self.in_flight} generations; try again in {wait} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": wait},
            )
        self.in_flight += count

    def leave(self, seconds: float) -> None:
        """Give a place back after `seconds`."""
        self.in_flight -= 1
        self._seconds += 0.1 * (seconds - self._seconds)


def warning_header(fields: Mapping[str, Any]) -> dict[str, str]:
    """A header that names fields of a request that the server does not know, and so ignored."""
    if not fields:
        return {}
    names = [ascii(name)[1:-1][:64].replace('"', "'") for name in list(fields)[:8]]
    more = ", …" if len(fields) > len(names) else ""
    return {"Warning": f'299 llmkit "ignored unknown fields: {", ".join(names)}{more}"'.replace("…", "...")}
