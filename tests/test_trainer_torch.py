"""Trainer `torch`: the contract, and that it is GPT-2 with llm.c's recipe."""

from __future__ import annotations

import pytest

from llmkit.testing import TrainerContract
from llmkit.trainer import Trainer

torch = pytest.importorskip("torch")


class TestTorchContract(TrainerContract):
    @pytest.fixture
    def trainer(self) -> type[Trainer]:
        from llmkit_torch import TorchTrainer

        return TorchTrainer
