"""The plugin keeps the contract of trainers."""

from __future__ import annotations

import pytest

from llmkit.testing.trainer import TrainerContract
from llmkit.trainer import Trainer
from llmkit_llmc.trainer import LlmcTrainer


class TestLlmcTrainer(TrainerContract):
    @pytest.fixture
    def trainer(self) -> type[Trainer]:
        return LlmcTrainer
