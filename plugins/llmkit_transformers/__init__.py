"""Engine `transformers`: any causal language model that transformers loads. The reference for other engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit import hookimpl

if TYPE_CHECKING:
    from llmkit.engine import Engine


@hookimpl
def llmkit_register_engines() -> list[type[Engine]]:
    from llmkit_transformers.engine import TransformersEngine

    return [TransformersEngine]
