"""Server: serves one or several checkpoints until it is told to stop."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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
    """Serves checkpoints over a network.

    Attributes:
        takes_arguments: whether it has a use for `arguments`.
        arguments: what stands behind `--` on the command line, for a program that the server runs.
    """

    Options: ClassVar[type[ServerOptions]] = ServerOptions
    takes_arguments: ClassVar[bool] = False
    arguments: tuple[str, ...] = ()

    @abstractmethod
    def serve(
        self,
        checkpoints: Mapping[str, Checkpoint],
        options: ServerOptions,
        *,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """Serve until `stop` is set; return when all is closed.

        `checkpoints`, at least one, are by the names that clients ask for; the first is meant where none is named. The
        same object under several names is one model with aliases, to be loaded once. Calls `ready(url)` once, when
        requests are answered. Raises OSError where the address cannot be had, and ValueError where it cannot serve
        what it is given, such as several models at once.
        """
