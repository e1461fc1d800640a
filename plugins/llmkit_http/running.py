"""run_server: the event loop with uvicorn; it answers that it is loading while it is, and drains at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn

from llmkit.checkpoint import Checkpoint
from llmkit_http.app import create_app
from llmkit_http.models import Models
from llmkit_http.options import HttpOptions
from llmkit_http.service import Service

MAX_HEAD = 2**16  # bytes of a request's line and headers


def run_server(
    checkpoints: Mapping[str, Checkpoint],
    options: HttpOptions,
    keys: list[str],
    listener: socket.socket,
    *,
    ready: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Serve on a listening socket until `stop` is set, then drain. Raises what loading the models raises."""
    at = Service(Models(checkpoints), options)
    logging.getLogger("uvicorn.error").addFilter(_worth_logging)
    server = _uvicorn(create_app(at, keys), options)
    scheme = "https" if options.tls_cert else "http"
    url = f"{scheme}://{_host_in_url(options.host)}:{listener.getsockname()[1]}"
    try:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_serve(server, listener, at, lambda: ready(url), stop))
    finally:
        at.models.close()


def _worth_logging(record: logging.LogRecord) -> bool:
    """Not that requests were cancelled, or that a response was not completed: both are ends that the server makes."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False
    return "without completing response" not in record.getMessage()


async def _serve(
    server: uvicorn.Server, listener: socket.socket, at: Service, ready: Callable[[], None], stop: threading.Event
) -> None:
    """Serve until `stop`, then drain. Raises what loading the models raises."""
    loop = asyncio.get_running_loop()
    watching = threading.Event()

    def watch() -> None:  # an Event of threading cannot be awaited
        while not stop.wait(0.2):
            if watching.is_set():
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(drain)

    def drain() -> None:
        at.models.state = "draining"
        server.should_exit = True

    async def load() -> None:
        try:
            await asyncio.to_thread(at.models.load, at.options)
        except BaseException:
            server.should_exit = True
            raise
        if not stop.is_set():
            ready()

    threading.Thread(target=watch, name="llmkit-stop", daemon=True).start()
    loading = asyncio.create_task(load())
    try:
        await server.serve(sockets=[listener])
        await loading
    finally:
        watching.set()


def _protocol() -> Any:
    """uvicorn's protocol on httptools, with the bound on a request's head that the one on h11 has by itself."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class LimitedHead(HttpToolsProtocol):
        head, in_body = 0, False

        def on_headers_complete(self) -> None:
            self.in_body = True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self.head, self.in_body = 0, False
            super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            self.head += len(data)
            super().data_received(data)
            if not self.in_body and self.head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The request's head is too large.")

    return LimitedHead


def _uvicorn(app: object, options: HttpOptions) -> uvicorn.Server:
    class Quiet(uvicorn.Server):
        """Leaves signals to the command line."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=_protocol(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=options.drain_seconds,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    return Quiet(config)


def _host_in_url(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host
