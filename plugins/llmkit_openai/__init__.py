"""Engine `openai`: a model behind an endpoint that speaks OpenAI's completions, as vLLM, SGLang and llmkit serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit import hookimpl

if TYPE_CHECKING:
    from llmkit.engine import Engine


@hookimpl
def llmkit_register_engines() -> list[type[Engine]]:
    from llmkit_openai.engine import OpenAIEngine

    return [OpenAIEngine]
