"""Architectures that transformers does not have: where plugins announce theirs, and how they become known.

A plugin names the class of its model in its pyproject.toml, under the `model_type` of config.json:

    [project.entry-points."llmkit.architectures"]
    mymodel = "llmkit_mymodel.hf:MyModelForCausalLM"

Importing the module registers configuration and classes with transformers' AutoConfig, AutoModel and
AutoModelForCausalLM. The module imports torch, transformers and the standard library only, nothing of its own package:
vLLM runs it in an environment that has neither llmkit nor the rest of the plugin.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

GROUP = "llmkit.architectures"


def find_architecture(model_type: str) -> EntryPoint | None:
    """The plugin's entry for a `model_type` of config.json, or None where no plugin announces it."""
    found = sorted(entry_points(group=GROUP, name=model_type), key=lambda entry: entry.value)
    return found[0] if found else None


def register_architecture(model_type: str) -> bool:
    """Make an architecture known to transformers in this process; False where no plugin announces it."""
    entry = find_architecture(model_type)
    if entry is None:
        return False
    entry.load()
    return True


def source_file(entry: EntryPoint) -> Path:
    """The file of the module that an entry names. Raises ValueError where it is no single Python file."""
    try:
        spec = find_spec(entry.module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"architecture {entry.name!r}: module {entry.module} is no Python file that can be found")
    return Path(spec.origin)
