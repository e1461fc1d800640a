"""Trainer `llmc`: GPT-2 in C, compiled for this machine on first use. It needs a C compiler and no PyTorch."""

from llmkit import hookimpl
from llmkit.trainer import Trainer
from llmkit_llmc.trainer import LlmcTrainer


@hookimpl
def llmkit_register_trainers() -> list[type[Trainer]]:
    return [LlmcTrainer]
