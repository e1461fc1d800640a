"""Trainer `speedrun`: the 5-minute architecture of the NanoGPT speedrun, trained with Muon."""

from __future__ import annotations

from llmkit import hookimpl
from llmkit.trainer import Trainer
from llmkit_speedrun.trainer import SpeedrunTrainer

__all__ = ["SpeedrunTrainer", "llmkit_register_trainers"]


@hookimpl
def llmkit_register_trainers() -> list[type[Trainer]]:
    return [SpeedrunTrainer]
