"""HttpServer: what `llmkit serve` finds; the rest is imported when it serves."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from llmkit.server import Server, ServerOptions
from llmkit_http.options import HttpOptions

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint


class HttpServer(Server):
    """OpenAI-compatible HTTP server with a chat page, over any engine."""

    name: ClassVar[str] = "http"
    requires: ClassVar[tuple[str, ...]] = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "jinja2")
    Options: ClassVar[type[ServerOptions]] = HttpOptions

    def serve(
        self,
        checkpoints: Mapping[str, Checkpoint],
        options: ServerOptions,
        *,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        assert isinstance(options, HttpOptions)
        keys = options.read_api_keys()
        options.check_tls()
        with contextlib.closing(_listen(options.host, options.port)) as listener:
            from llmkit_http.running import run_server

            run_server(checkpoints, options, keys, listener, ready=ready, stop=stop)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError, naming the address, where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise OSError(f"--host {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener
