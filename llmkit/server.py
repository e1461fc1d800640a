"""Server: serves one or more checkpoints until it is told to stop."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmkit.component import Component
from llmkit.options import option

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of every server. A server adds its own in a subclass; each field becomes a flag of `llmkit serve`."""

    host: str = option("127.0.0.1", "Address to listen on; the default answers this machine only.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", minimum=0)


class Server(Component, ABC):
    """Serves a checkpoint over a network or a terminal."""

    Options: ClassVar[type[ServerOptions]] = ServerOptions

    @abstractmethod
    def serve(
        self,
        checkpoint: Checkpoint,
        options: ServerOptions,
        *,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """Serve until `stop` is set; return when all is closed.

        Calls `ready(url)` once, when requests are answered. Raises OSError where the address cannot be had.
        """
