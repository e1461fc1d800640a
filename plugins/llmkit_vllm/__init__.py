"""Server and engine `vllm`: vLLM, in this environment or one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit import hookimpl

if TYPE_CHECKING:
    from llmkit.engine import Engine
    from llmkit.server import Server


@hookimpl
def llmkit_register_engines() -> list[type[Engine]]:
    from llmkit_vllm.engine import VLLMEngine

    return [VLLMEngine]


@hookimpl
def llmkit_register_servers() -> list[type[Server]]:
    from llmkit_vllm.server import VLLMServer

    return [VLLMServer]
