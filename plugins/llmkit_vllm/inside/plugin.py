"""vLLM's plugin, which each of its processes calls: makes the architecture known that a plugin of llmkit brings."""

from __future__ import annotations

from importlib.metadata import distribution

RUN_BY = "vllm.model_executor.models.transformers:TransformersForCausalLM"  # vLLM's way to run transformers' models


def register() -> None:
    """Register the classes that the bridge's entry points name. Called several times in a process."""
    from vllm import ModelRegistry

    for entry in distribution("llmkit_inside").entry_points.select(group="llmkit.architectures"):
        cls = entry.load()  # importing its module makes it known to transformers
        if cls.__name__ not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(cls.__name__, RUN_BY)
