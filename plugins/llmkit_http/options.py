"""HttpOptions: the flags of `llmkit serve` with the server `http`."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.options import option
from llmkit.server import HttpServerOptions


@dataclass(frozen=True, kw_only=True)
class HttpOptions(HttpServerOptions):
    """Flags of `llmkit serve --server http`."""

    engine: str | None = option(None, "Which engine.  [default: the one for the model's architecture]", metavar="NAME")
    dtype: str | None = option(None, "[default: the checkpoint's]", choices=("fp32", "bf16"))
    quantize: str | None = option(None, "Round the weights to this type when they are loaded.", choices=("int8",))
    device: str | None = option(None, "cpu, cuda, cuda:1, mps  [default: the best there is]", metavar="NAME")
    max_n: int = option(16, "Most answers to one prompt.", minimum=1)
    max_tokens: int | None = option(None, "Most tokens of an answer.  [default: what the context holds]", minimum=1)
