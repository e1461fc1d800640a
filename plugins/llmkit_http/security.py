"""Who may ask: API keys, and the names under which a server without keys may be called."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.server import is_loopback
from llmkit_http.errors import APIError

OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json"})  # they say nothing of what the server is used for


class ApiKeys:
    """ASGI middleware: 401 unless a request has one of the keys. The page and its files need none: they ask for it."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guarded(scope) and not self._has_key(Headers(scope=scope)):
            error = APIError(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @staticmethod
    def _guarded(scope: Scope) -> bool:
        path = scope["path"]
        if path in OPEN_PATHS:
            return False
        return scope["method"] not in ("GET", "HEAD") or path.startswith("/v1/") or path == "/metrics"

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # Digests of one length, compared to the end with every key: the time taken says nothing of how much is right.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class LocalHost:
    """ASGI middleware for a server without keys: 403 unless the Host header is a name of this machine.

    A page of another site whose name resolves to 127.0.0.1 is of the same origin for a browser, so without this it
    could use the server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "localhost")
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            if not is_loopback(name.strip("[]").lower()):
                error = APIError(403, f"Host {host[:80]!r} is not this machine; serve with an API key to be called so.")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
