"""HttpOptions: the flags of `llmkit serve` with the server `http`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from llmkit.options import option
from llmkit.server import ServerOptions

API_KEYS_VARIABLE = "LLMKIT_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class HttpOptions(ServerOptions):
    """Flags of `llmkit serve --server http`."""

    engine: str | None = option(None, "Which engine.  [default: the one for the model's architecture]", metavar="NAME")
    dtype: str | None = option(None, "[default: the checkpoint's]", choices=("fp32", "bf16"))
    quantize: str | None = option(None, "Round the weights to this type when they are loaded.", choices=("int8",))
    device: str | None = option(None, "cpu, cuda, cuda:1, mps  [default: the best there is]", metavar="NAME")
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
    max_n: int = option(16, "Most answers to one prompt.", minimum=1)
    max_tokens: int | None = option(None, "Most tokens of an answer.  [default: what the context holds]", minimum=1)
    drain_seconds: int = option(
        30,
        "How long answers in progress may take to end after Ctrl-C or SIGTERM; a second ends at once.",
        minimum=0,
    )


def read_api_keys(options: HttpOptions) -> list[str]:
    """The keys that are accepted; none on loopback means that no key is needed.

    Raises ValueError where the file has none, or the address is not loopback and there is no key.
    """
    if options.api_key_file is not None:
        lines = (line.strip() for line in Path(options.api_key_file).expanduser().read_text("utf-8").splitlines())
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"--api-key-file {options.api_key_file} has no key in it")
        return keys
    keys = os.environ.get(API_KEYS_VARIABLE, "").split()
    if not keys and not is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} lets other machines in, so an API key is needed: "
            f"give --api-key-file, or put it into {API_KEYS_VARIABLE}"
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
