"""Engine `llmkit`: the embedded engine. Continuous batching, a shared-prefix cache, compiled for this processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit import hookimpl

if TYPE_CHECKING:
    from llmkit.engine import Engine


@hookimpl
def llmkit_register_engines() -> list[type[Engine]]:
    from llmkit_engine.engine import EmbeddedEngine

    return [EmbeddedEngine]
