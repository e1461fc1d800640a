"""Server `example`: POST a prompt as plain text, get a continuation as plain text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llmkit import hookimpl
from llmkit.checkpoint import Checkpoint
from llmkit.engine import GenerateRequest, Sampling
from llmkit.options import option
from llmkit.server import Server, ServerOptions


@dataclass(frozen=True, kw_only=True)
class ExampleOptions(ServerOptions):
    """Flags of `llmkit serve --server example`."""

    max_tokens: int = option(64, "Tokens in an answer.", minimum=1)


class Example(Server):
    """Plain text in, plain text out."""

    name = "example"
    Options = ExampleOptions

    def serve(
        self,
        checkpoints: Mapping[str, Checkpoint],
        options: ExampleOptions,
        *,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        from llmkit.engines import open_engine

        name, checkpoint = next(iter(checkpoints.items()))
        if any(other is not checkpoint for other in checkpoints.values()):
            raise ValueError(f"server {self.name!r} serves one checkpoint at a time: give it {name} alone")
        one_at_a_time = threading.Lock()
        sampling = Sampling(max_tokens=options.max_tokens)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                prompt = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode("utf-8", "replace")
                ids = tuple(checkpoint.tokenizer.encode_prompt(prompt))
                if not ids or len(ids) >= engine.context_length:
                    self.answer(400, f"a prompt has from 1 to {engine.context_length - 1} tokens, not {len(ids)}")
                    return
                with one_at_a_time:
                    chunks = engine.generate([GenerateRequest(0, ids, sampling)])
                    tokens = [token for chunk in chunks for token in chunk.tokens]
                self.answer(200, checkpoint.tokenizer.decode(tokens))

            def answer(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        with ThreadingHTTPServer((options.host, options.port), Handler) as server, open_engine(checkpoint) as engine:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            ready(f"http://{options.host}:{server.server_port}")
            stop.wait()
            server.shutdown()


@hookimpl
def llmkit_register_servers() -> list[type[Server]]:
    return [Example]
