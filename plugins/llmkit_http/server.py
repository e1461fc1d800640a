"""HttpServer: binds the address, loads the models while it already says that they are loading, serves, and drains."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from llmkit.checkpoint import Checkpoint
from llmkit.server import Server, ServerOptions
from llmkit_http.options import HttpOptions, read_api_keys

if TYPE_CHECKING:
    import uvicorn

    from llmkit_http.service import Service


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
        keys = read_api_keys(options)
        if (options.tls_cert is None) != (options.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together")
        with contextlib.closing(_listen(options.host, options.port)) as listener:
            from llmkit_http.app import create_app
            from llmkit_http.metrics import Metrics
            from llmkit_http.models import Models
            from llmkit_http.service import Service

            at = Service(Models(checkpoints), options, Metrics())
            server = _uvicorn(create_app(at, keys), options)
            scheme = "https" if options.tls_cert else "http"
            url = f"{scheme}://{_host_in_url(options.host)}:{listener.getsockname()[1]}"
            loop_factory = server.config.get_loop_factory()
            try:
                with asyncio.Runner(loop_factory=loop_factory) as runner:
                    runner.run(_serve(server, listener, at, lambda: ready(url), stop))
            finally:
                at.models.close()


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


def _uvicorn(app: object, options: HttpOptions) -> uvicorn.Server:
    import uvicorn

    class Quiet(uvicorn.Server):
        """Leaves signals to the command line."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
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


def _host_in_url(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host
