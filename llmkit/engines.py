"""Choosing an engine: the one that the user names, else the one made for the checkpoint's architecture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.component import missing_modules, require
from llmkit.engine import UnsupportedModel
from llmkit.plugins import get_plugins

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.engine import Engine

GENERAL = "transformers"  # runs any architecture, so it takes what no other engine announces


def open_engine(
    checkpoint: Checkpoint,
    name: str | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    url: str | None = None,
    model: str | None = None,
) -> Engine:
    """Load `checkpoint` in the engine `name`; None takes the default for its architecture.

    `dtype` is fp32 or bf16 (None: the checkpoint's), `device` as in PyTorch (None: the best), `quantize` one of the
    engine's `quantizations`; `url` and `model` are those of an endpoint, for a remote engine. A model that the default
    engine does not know, or turns out not to run, goes to GENERAL, with a line on stderr. Raises UnknownComponent with
    the nearest names, MissingRequirement with the pip line, and ValueError or CheckpointError from the engine.
    """
    engine = default_engine(checkpoint.architecture, device) if name is None else get_plugins().engine(name)
    if name is None and engine.name == GENERAL and not _known(checkpoint.architecture):
        print(
            f"llmkit: engine {GENERAL!r} runs {checkpoint.architecture}, which no other engine knows", file=sys.stderr
        )
    require(engine.requires, f"engine {engine.name!r}")
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if quantize is not None:
        if quantize not in engine.quantizations:
            known = ", ".join(engine.quantizations) or "none"
            raise ValueError(f"quantize: engine {engine.name!r} has no {quantize!r} weights (it has: {known})")
        options["quantize"] = quantize
    if engine.remote:
        options |= {"url": url, "model": model}
    elif url is not None or model is not None:
        raise ValueError(f"engine {engine.name!r} runs here: an endpoint's address and model are for --engine openai")
    try:
        return engine.open(checkpoint, **options)
    except UnsupportedModel as error:
        if name is not None or quantize is not None or engine.name == GENERAL:
            raise
        print(f"llmkit: {error}; engine {GENERAL!r} runs it instead", file=sys.stderr)
    general: type[Engine] = get_plugins().engine(GENERAL)
    require(general.requires, f"engine {GENERAL!r}")
    return general.open(checkpoint, **options)


def default_engine(architecture: str, device: str | None = None) -> type[Engine]:
    """The first engine by name that announces `architecture` and can be used here, else GENERAL.

    GENERAL too where another device than the CPU is asked for, or there is an Nvidia GPU to be used.
    """
    general: type[Engine] = get_plugins().engine(GENERAL)
    if device not in (None, "cpu") or (device is None and _has_gpu() and not missing_modules(general.requires)):
        return general
    engines: list[type[Engine]] = get_plugins().all("engine")
    for engine in engines:
        if architecture in engine.architectures and engine.unavailable() is None:
            return engine
    return general


def _known(architecture: str) -> bool:
    """Does an engine announce it; or is there none but GENERAL, so that nothing is worth saying?"""
    announced = [engine.architectures for engine in get_plugins().all("engine") if engine.architectures]
    return not announced or any(architecture in names for names in announced)


def _has_gpu() -> bool:
    """Whether the Nvidia driver shows a device; asking PyTorch would take seconds."""
    return Path("/dev/nvidia0").exists()
