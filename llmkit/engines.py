"""Choosing an engine: the one that the user names, else the one made for the checkpoint's architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.component import missing_modules, require
from llmkit.plugins import get_plugins

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.engine import Engine

GENERAL = "transformers"  # runs any architecture, so it takes what no other engine announces


def open_engine(
    checkpoint: Checkpoint, name: str | None = None, *, dtype: str | None = None, device: str | None = None
) -> Engine:
    """Load `checkpoint` in the engine `name`; None takes the default for its architecture.

    `dtype` is fp32 or bf16 (None: the checkpoint's), `device` as in PyTorch (None: the best). Raises UnknownComponent
    with the nearest names, MissingRequirement with the pip line, and ValueError or CheckpointError from the engine.
    """
    engine = default_engine(checkpoint.architecture) if name is None else get_plugins().engine(name)
    require(engine.requires, f"engine {engine.name!r}")
    return engine.open(checkpoint, dtype=dtype, device=device)


def default_engine(architecture: str) -> type[Engine]:
    """The first engine by name that announces `architecture` and whose requirements are installed, else GENERAL."""
    engines: list[type[Engine]] = get_plugins().all("engine")
    for engine in engines:
        if architecture in engine.architectures and not missing_modules(engine.requires):
            return engine
    return get_plugins().engine(GENERAL)
