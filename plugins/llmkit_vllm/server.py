"""VLLMServer: vLLM's own OpenAI-compatible server, started, watched and ended as the embedded one would be."""

from __future__ import annotations

import contextlib
import json
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
from llmkit.server import HttpServerOptions, Server, ServerOptions
from llmkit_http.page import PAGE_HEADERS, STATIC
from llmkit_vllm.bridge import bridge
from llmkit_vllm.environment import ENVIRONMENT, find_python, why_unavailable
from llmkit_vllm.model import check_model, dtype_name, one_model
from llmkit_vllm.process import VLLMProcess

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint

MODULE = "vllm.entrypoints.openai.api_server"
POLL_SECONDS = 0.5
HEALTH_SECONDS = 5  # that an answer may take: vLLM answers late while it is busy, and that is no failure


@dataclass(frozen=True, kw_only=True)
class VLLMOptions(HttpServerOptions):
    """Flags of `llmkit serve --server vllm`. What stands behind `--` goes to vLLM as it is."""

    dtype: str | None = option(
        None, "Type of the weights and of arithmetic.  [default: the checkpoint's]", choices=("fp32", "bf16")
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
        keys = options.read_api_keys()
        options.check_tls()
        python = find_python(options.vllm_python)
        check_model(checkpoint, text=True)
        with _reserved(options.host, options.port) as port, bridge(checkpoint.config) as folder:
            arguments = vllm_arguments(checkpoint, list(checkpoints), options, port)
            if checkpoint.chat_template is None:
                arguments.append(f"--chat-template={_write_plain_template(folder)}")
            settings = {
                "api_keys": keys,
                "max_body": options.max_body * 2**20,
                "max_queue": options.max_queue,
                "has_chat_template": checkpoint.chat_template is not None,
                "page": {"folder": str(STATIC), "headers": PAGE_HEADERS},
            }
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
    arguments = [
        f"--model={checkpoint.path.resolve()}",
        "--served-model-name",
        *names,
        f"--host={options.host}",
        f"--port={port}",
        f"--dtype={dtype_name(checkpoint, options.dtype)}",
        f"--allowed-origins={json.dumps(options.cors_origins)}",
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
