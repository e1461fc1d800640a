"""Contract of servers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.plugins import NAME
from llmkit.server import Server, ServerOptions
from llmkit.testing.tiny import tiny_checkpoint


class ServerContract:
    """Give the fixture `server`. `timeout` is how long it may take to be ready or to stop, in seconds."""

    timeout = 120.0

    @pytest.fixture
    def server(self) -> type[Server]:
        raise NotImplementedError("a subclass of ServerContract gives the fixture `server`")

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Checkpoint:
        return tiny_checkpoint(tmp_path / "checkpoint")

    @pytest.fixture
    def running(self, server: type[Server], checkpoint: Checkpoint) -> Iterator[str]:
        """The URL of a server that is ready; it is stopped afterwards and must then end."""
        urls: list[str] = []
        errors: list[BaseException] = []
        ready, stop = threading.Event(), threading.Event()

        def announce(url: str) -> None:
            urls.append(url)
            ready.set()

        def serve() -> None:
            try:
                server().serve({"tiny": checkpoint}, server.Options(port=0), ready=announce, stop=stop)
            except BaseException as error:  # shown by the test, which runs in another thread
                errors.append(error)
                ready.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert ready.wait(self.timeout), "the server did not call ready()"
        if errors:
            raise errors[0]
        yield urls[0]
        stop.set()
        thread.join(self.timeout)
        assert not thread.is_alive(), "the server did not stop"
        assert not errors, f"the server ended with {errors[0]!r}"
        assert len(urls) == 1, "ready() was called more than once"

    def test_has_a_name_and_options(self, server: type[Server]) -> None:
        assert NAME.fullmatch(server.name)
        assert server.summary()
        assert issubclass(server.Options, ServerOptions)
        assert server.Options().host == "127.0.0.1", "a server listens on this machine only unless told otherwise"

    def test_it_answers_when_ready(self, running: str) -> None:
        address = urlsplit(running)
        assert address.hostname and address.port
        with socket.create_connection((address.hostname, address.port), timeout=10):
            pass

    def test_a_taken_port_is_an_os_error(self, server: type[Server], checkpoint: Checkpoint) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            options = server.Options(port=taken.getsockname()[1])
            with pytest.raises(OSError):
                server().serve({"tiny": checkpoint}, options, ready=lambda url: None, stop=threading.Event())
