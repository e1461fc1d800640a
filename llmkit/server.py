"""Server: serves one or several checkpoints until it is told to stop."""

from __future__ import annotations

import ipaddress
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit.component import Component
from llmkit.options import option

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint


API_KEYS_VARIABLE = "LLMKIT_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of every server. A server adds its own in a subclass; each field becomes a flag of `llmkit serve`."""

    host: str = option("127.0.0.1", "Address to listen on; the default answers this machine only.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class HttpServerOptions(ServerOptions):
    """Options of servers that speak HTTP: who may use them, how, and how much at once."""

    api_key_file: str | None = option(
        None,
        f"File with the API keys that are accepted, one a line; without it they are those in {API_KEYS_VARIABLE}. "
        "Needed where --host is not this machine only.",
        metavar="FILE",
    )
    cors_origin: str | None = option(
        None, "Web pages of these origins may use the server, separated by commas; * for all.", metavar="ORIGINS"
    )
    tls_cert: str | None = option(None, "Certificate chain in PEM; with it the server speaks https.", metavar="FILE")
    tls_key: str | None = option(None, "Private key of the certificate in PEM.", metavar="FILE")
    max_queue: int = option(
        256, "Generations that may wait or run at once; beyond it requests are answered with 429.", minimum=1
    )
    max_body: int = option(8, "Largest body of a request in MiB.", minimum=1)
    drain_seconds: int = option(
        30,
        "How long answers in progress may take to end after Ctrl-C or SIGTERM; a second ends at once.",
        minimum=0,
    )

    @property
    def cors_origins(self) -> list[str]:
        return [origin.strip() for origin in (self.cors_origin or "").split(",") if origin.strip()]

    def read_api_keys(self) -> list[str]:
        """The keys that are accepted; none on loopback means that no key is needed.

        Raises ValueError where the file has none, or the address is not loopback and there is no key; OSError where
        the file cannot be read.
        """
        if self.api_key_file is not None:
            lines = (line.strip() for line in Path(self.api_key_file).expanduser().read_text("utf-8").splitlines())
            keys = [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ValueError(f"--api-key-file {self.api_key_file} has no key in it")
            return keys
        keys = os.environ.get(API_KEYS_VARIABLE, "").split()
        if not keys and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} lets other machines in, so an API key is needed: "
                f"give --api-key-file, or put it into {API_KEYS_VARIABLE}"
            )
        return keys

    def check_tls(self) -> None:
        """Raise ValueError unless certificate and key are both given and fit, or neither; OSError if unreadable."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
        if self.tls_cert is not None and self.tls_key is not None:
            import ssl

            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.tls_cert, self.tls_key)
            except ssl.SSLError as error:
                raise ValueError(f"--tls-cert, --tls-key: they do not fit together or are damaged ({error})") from None


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
