"""Envelope: ASGI middleware around vLLM's server, so that clients need not know which server they talk to.

Errors come in one envelope, in streams too; keys are wanted for every path but /health; bodies and the number of
requests at once are bounded; /v1/models/{id} exists, and so does the chat page at /. It is outermost, so it sees what
vLLM's own handlers answered.
Configured by $LLMKIT_INSIDE.
"""

from __future__ import annotations

import hmac
import json
import logging
import mimetypes
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import Envelope as ErrorEnvelope
from .errors import envelope, normalise

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ping")  # what may be asked without a key
STREAM_ERROR = b'data: {"error"'
RETRY_SECONDS = 1
DISCARD = 8  # times the largest body, that a body is read and dropped

logger = logging.getLogger("vllm.llmkit")


class TooLarge(Exception):
    """The body has more bytes than are accepted; `more` of it are to come."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.more = more


class Envelope:
    """The middleware; vLLM makes it with the application that it wraps."""

    def __init__(self, app: App) -> None:
        settings = json.loads(os.environ.get("LLMKIT_INSIDE", "{}"))
        self.app = app
        self.keys = [key.encode() for key in settings.get("api_keys", [])]
        self.max_body: int = settings.get("max_body", 2**23)
        self.max_queue: int = settings.get("max_queue", 256)
        self.has_chat_template: bool = settings.get("has_chat_template", True)
        self.page = Page(**settings["page"]) if "page" in settings else None
        self.in_flight = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # vLLM's speech; a key could not be asked for
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        if self.page and method in ("GET", "HEAD") and (file := self.page.find(path)):
            await self.page.answer(send, file)
        elif method != "OPTIONS" and path not in OPEN and not self.is_allowed(scope):
            message = "A valid API key is needed, as `Authorization: Bearer KEY`."
            await _answer(send, 401, envelope(401, message, code="invalid_api_key"))
        elif path == "/v1/models" and method == "GET":
            if (models := await self.models(scope, receive, send)) is not None:
                await _answer(send, 200, {"object": "list", "data": models})
        elif path.startswith("/v1/models/") and method in ("GET", "HEAD"):
            await self.answer_model(scope, receive, send, unquote(path.removeprefix("/v1/models/")))
        elif method == "POST" and path.startswith("/v1/"):
            await self.admit(scope, receive, send)
        else:
            await self.forward(scope, receive, send)

    async def admit(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Forward a request to generate, unless there are too many at once."""
        if self.in_flight >= self.max_queue:
            message = f"The server is busy with {self.in_flight} requests; try again in {RETRY_SECONDS} s."
            retry = [(b"retry-after", str(RETRY_SECONDS).encode())]
            await _answer(send, 429, envelope(429, message, code="rate_limit_exceeded"), retry)
            return
        self.in_flight += 1
        try:
            await self.forward(scope, receive, send)
        finally:
            self.in_flight -= 1

    def is_allowed(self, scope: MutableMapping[str, Any]) -> bool:
        """Does the request carry one of the keys? All are compared, in constant time each."""
        if not self.keys:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return scheme.lower() == b"bearer" and any(matches)

    async def forward(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back, errors rewritten."""
        answer = _Answer(send, method=scope["method"], path=scope["path"])
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if length.isdigit() and int(length) > self.max_body:
            await self.refuse(receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                raise TooLarge(message.get("more_body", False))
            return message

        try:
            await self.app(scope, limited, answer.send)
        except TooLarge as error:
            await self.refuse(receive, send, more=error.more)
        except Exception:
            logger.exception("a request failed: %s %s", scope["method"], scope["path"])
            await answer.fail()

    async def refuse(self, receive: Receive, send: Send, *, more: bool = True) -> None:
        """413. What the client is still sending is read, within reason: else it sees no answer but a broken pipe."""
        seen = 0
        while more and seen < DISCARD * self.max_body:
            part = await receive()
            seen, more = seen + len(part.get("body", b"")), part.get("more_body", False)
        message = f"The body is larger than the {self.max_body} bytes that this server takes."
        await _answer(send, 413, envelope(413, message))

    async def models(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> list[dict[str, Any]] | None:
        """vLLM's list of models, with what the page wants to know of each; None where it gave none but an error, which
        has been sent on.
        """
        answer: list[Message] = []

        async def collect(message: Message) -> None:
            answer.append(message)

        asked = {**scope, "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models"}
        await self.forward(asked, receive, collect)
        if answer[0]["status"] != 200:
            for message in answer:
                await send(message)
            return None
        models: list[dict[str, Any]] = json.loads(b"".join(message.get("body", b"") for message in answer))["data"]
        return [{**model, "has_chat_template": self.has_chat_template} for model in models]

    async def answer_model(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, name: str) -> None:
        """One entry of the list of models, which vLLM gives only as a whole."""
        models = await self.models(scope, receive, send)
        if models is None:
            return
        found = next((model for model in models if model["id"] == name), None)
        if found is not None:
            await _answer(send, 200, found)
            return
        names = ", ".join(model["id"] for model in models)
        message = f"The model `{name}` does not exist. This server has: {names}."
        await _answer(send, 404, envelope(404, message, param="model", code="model_not_found"))


class Page:
    """The files of the chat page, which need no key."""

    def __init__(self, folder: str, headers: dict[str, str]) -> None:
        self.files = {f"/{path.name}": path for path in Path(folder).iterdir() if path.is_file()}
        self.files["/"] = self.files["/index.html"]
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    def find(self, path: str) -> Path | None:
        return self.files.get(path)

    async def answer(self, send: Send, file: Path) -> None:
        body = file.read_bytes()
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        own = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": own + self.headers})
        await send({"type": "http.response.body", "body": body})


class _Answer:
    """The way back of one request: an error's body is held back and rewritten, everything else passes through."""

    def __init__(self, send: Send, *, method: str, path: str) -> None:
        self._send, self._method, self._path = send, method, path
        self._status = 0
        self._streams = False
        self._held: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message.get("headers", []))
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._status >= 400 and self._path not in OPEN:
                self._held = message
                return
        elif message["type"] == "http.response.body":
            if self._held is not None:
                self._body += message.get("body", b"")
                if not message.get("more_body"):
                    await self._rewrite()
                return
            if self._streams and message.get("body", b"").startswith(STREAM_ERROR):
                message = {**message, "body": _stream_error(message["body"], self._path)}
        await self._send(message)

    async def _rewrite(self) -> None:
        status = self._status
        error = normalise(status, self._body, method=self._method, path=self._path)
        if error["error"]["code"] == "context_length_exceeded":
            status = 400
        headers = [(b"retry-after", str(RETRY_SECONDS).encode())] if status in (429, 503) else []
        await _answer(self._send, status, error, headers)

    async def fail(self) -> None:
        """What vLLM did not answer itself: an envelope, or the end of the stream with one."""
        error = envelope(500, "The server failed on this request; its log says why.")
        if self._status == 0 or self._held is not None:
            await _answer(self._send, 500, error)
            return
        body = b"data: " + json.dumps(error).encode() + b"\n\n" if self._streams else b""
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _stream_error(chunk: bytes, path: str) -> bytes:
    """The event of an error in the middle of a stream, rewritten; what follows it in the chunk stays."""
    event, separator, rest = chunk.partition(b"\n\n")
    error = normalise(500, event.removeprefix(b"data: "), method="POST", path=path)
    return b"data: " + json.dumps(error).encode() + separator + rest


async def _answer(
    send: Send, status: int, value: ErrorEnvelope | dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": own + (headers or [])})
    await send({"type": "http.response.body", "body": body})
