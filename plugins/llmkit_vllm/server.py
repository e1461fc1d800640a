"""VLLMServer: vLLM's own OpenAI-compatible server, started, watched and ended as the embedded one would be."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit.options import option
from llmkit.server import Server, ServerOptions
from llmkit_vllm.bridge import bridge
from llmkit_vllm.environment import ENVIRONMENT, find_python, why_unavailable
from llmkit_vllm.model import check_model, dtype_name, one_model
from llmkit_vllm.process import VLLMProcess

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint

MODULE = "vllm.entrypoints.openai.api_server"
API_KEYS_VARIABLE = "LLMKIT_API_KEYS"
POLL_SECONDS = 0.5
HEALTH_SECONDS = 5  # that an answer may take: vLLM answers late while it is busy, and that is no failure


@dataclass(frozen=True, kw_only=True)
class VLLMOptions(ServerOptions):
    """Flags of `llmkit serve --server vllm`. What stands behind `--` goes to vLLM as it is."""

    dtype: str | None = option(
        None, "Type of the weights and of arithmetic.  [default: the checkpoint's]", choices=("fp32", "bf16")
    )
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
        256, "Requests that may wait or run at once; beyond it they are answered with 429.", minimum=1
    )
    max_body: int = option(8, "Largest body of a request in MiB.", minimum=1)
    drain_seconds: int = option(
        30,
        "How long answers in progress may take to end after Ctrl-C or SIGTERM; a second one ends at once.",
        minimum=0,
    )
    verbose: bool = option(False, "Show vLLM's log on stderr.")
    vllm_python: str | None = option(
        None,
        "Python that has vLLM.  [default: $LLMKIT_VLLM_PYTHON, this one if it has vLLM, or the environment that "
        "`llmkit plugins install vllm` makes]",
        metavar="PATH",
    )


class VLLMServer(Server):
    """vLLM's OpenAI-compatible server. One model; for GPUs, and for models that the embedded server does not run."""

    name: ClassVar[str] = "vllm"
    environment = ENVIRONMENT
    Options: ClassVar[type[ServerOptions]] = VLLMOptions
    takes_arguments: ClassVar[bool] = True

    @classmethod
    def unavailable(cls) -> str | None:
        return why_unavailable()

    def serve(
        self,
        checkpoints: Mapping[str, Checkpoint],
        options: ServerOptions,
        *,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        assert isinstance(options, VLLMOptions)
        checkpoint = one_model(checkpoints)
        keys = read_keys(options)
        check_tls(options)
        python = find_python(options.vllm_python)
        check_model(checkpoint, text=True)
        with _reserved(options.host, options.port) as port, bridge(checkpoint.config) as folder:
            arguments = vllm_arguments(checkpoint, list(checkpoints), options, port)
            if checkpoint.chat_template is None:
                arguments.append(f"--chat-template={_write_plain_template(folder)}")
            settings = {"api_keys": keys, "max_body": options.max_body * 2**20, "max_queue": options.max_queue}
            process = VLLMProcess(
                python,
                folder,
                ["llmkit_inside.launch", MODULE, *arguments, *self.arguments],
                settings={"LLMKIT_INSIDE": json.dumps(settings)},
                verbose=options.verbose,
            )
            url = f"http{'s' if options.tls_cert else ''}://{_in_url(options.host)}:{port}"
            try:
                if not self._wait_until_ready(process, _loopback(url, options.host), stop):
                    process.stop()
                    return
                ready(url)
                self._watch(process, _loopback(url, options.host), stop)
                process.stop(options.drain_seconds)
            finally:
                process.close()

    def _wait_until_ready(self, process: VLLMProcess, url: str, stop: threading.Event) -> bool:
        """False where it is to stop before it was ready. Raises VLLMError where vLLM ends."""
        from llmkit.cli.ui import progress

        with progress("starting vLLM", None) as update:
            while not stop.wait(POLL_SECONDS):
                if process.ended:
                    raise process.failure("vLLM could not be started")
                if health(url) == 200:
                    return True
                update(status=process.last_line[:120])
        return False

    def _watch(self, process: VLLMProcess, url: str, stop: threading.Event) -> None:
        """Return when it is to stop. Raises VLLMError where vLLM, its engine or a worker ends before."""
        while not stop.wait(POLL_SECONDS):
            if process.ended:
                raise process.failure("vLLM has ended by itself")
            if health(url) in (500, 503):  # the front lives, but what computes is dead
                raise process.failure("vLLM's engine has died")


def vllm_arguments(checkpoint: Checkpoint, names: list[str], options: VLLMOptions, port: int) -> list[str]:
    """Our options in vLLM's words."""
    origins = [origin.strip() for origin in (options.cors_origin or "").split(",") if origin.strip()]
    arguments = [
        f"--model={checkpoint.path.resolve()}",
        "--served-model-name",
        *names,
        f"--host={options.host}",
        f"--port={port}",
        f"--dtype={dtype_name(checkpoint, options.dtype)}",
        f"--allowed-origins={json.dumps(origins)}",
        "--middleware=llmkit_inside.middleware.Envelope",
        f"--shutdown-timeout={options.drain_seconds}",
    ]
    if options.tls_cert is not None:
        arguments += [f"--ssl-certfile={options.tls_cert}", f"--ssl-keyfile={options.tls_key}"]
    return arguments


def _write_plain_template(folder: Path) -> Path:
    """For base models, the transcript that the embedded server gives them too; vLLM would refuse to chat."""
    from llmkit.chat import PLAIN_TEMPLATE

    path = folder / "plain.jinja"
    path.write_text(PLAIN_TEMPLATE, "utf-8")
    return path


def read_keys(options: VLLMOptions) -> list[str]:
    """The keys that clients may use; none where anyone on this machine may.

    Raises ValueError for an empty file, and where other machines could use the server without a key.
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


def check_tls(options: VLLMOptions) -> None:
    """Raise ValueError unless certificate and key are both given, or neither; OSError where they cannot be read."""
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
    if options.tls_cert is not None and options.tls_key is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(options.tls_cert, options.tls_key)
        except ssl.SSLError as error:
            raise ValueError(f"--tls-cert, --tls-key: they do not fit together or are damaged ({error})") from None


def is_loopback(host: str) -> bool:
    """Does the address answer this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """The port, or a free one for 0, kept from others until vLLM, which may bind it beside us, listens on it.

    Raises OSError where the address cannot be had; vLLM would find out only after it has loaded its modules.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
        yield int(taken.getsockname()[1])


def health(url: str) -> int | None:
    """The status of /health, None where there is no answer. A certificate is not looked at: it is our own server."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(  # no proxy, whatever the environment says
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(f"{url}/health", timeout=HEALTH_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _loopback(url: str, host: str) -> str:
    """The URL at which we ourselves reach a server that listens on `host`."""
    return url.replace(_in_url(host), {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, _in_url(host)), 1)
