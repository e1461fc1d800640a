"""Trainer `torch`: GPT-2 in plain PyTorch with llm.c's recipe; the baseline that the other backends are held against."""

from llmkit import hookimpl
from llmkit.trainer import Trainer
from llmkit_torch.trainer import TorchTrainer


@hookimpl
def llmkit_register_trainers() -> list[type[Trainer]]:
    return [TorchTrainer]
