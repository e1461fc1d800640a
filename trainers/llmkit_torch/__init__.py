"""Trainer `torch`: GPT-2 in plain PyTorch with llm.c's recipe; the baseline for the other backends."""

from llmkit import hookimpl
from llmkit.trainer import Trainer
from llmkit_torch.trainer import TorchTrainer

__all__ = ["TorchTrainer", "llmkit_register_trainers"]


@hookimpl
def llmkit_register_trainers() -> list[type[Trainer]]:
    return [TorchTrainer]
