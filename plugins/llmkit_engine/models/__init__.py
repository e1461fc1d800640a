"""Architectures: each module here has ARCHITECTURES, class names in config.json, and `describe(config) -> ModelSpec`.

A further architecture is a further module; it is found by being here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from llmkit.engine import UnsupportedModel
from llmkit_engine.spec import ModelSpec

Describe = Callable[[Mapping[str, Any]], ModelSpec]


@cache
def architectures() -> dict[str, Describe]:
    """Class name in config.json -> the function that describes such a model."""
    found: dict[str, Describe] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found.update(dict.fromkeys(module.ARCHITECTURES, module.describe))
    return found


def describe(architecture: str, config: Mapping[str, Any]) -> ModelSpec:
    """The model that config.json describes. Raises UnsupportedModel, naming what is not supported."""
    known = architectures()
    if architecture not in known:
        raise UnsupportedModel(f"the architecture {architecture} (known: {', '.join(sorted(known))})")
    try:
        return known[architecture](config)
    except KeyError as error:
        raise UnsupportedModel(f"a config.json without {error}") from None
