"""Trainer `speedrun`: the contract of trainers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from llmkit.testing import TrainerContract
from llmkit.trainer import Trainer

torch = pytest.importorskip("torch")


class TestSpeedrunContract(TrainerContract):
    options: ClassVar[dict[str, Any]] = {**TrainerContract.options, "depth": 2, "learning_rate": 2e-2}

    @pytest.fixture
    def trainer(self) -> type[Trainer]:
        from llmkit_speedrun import SpeedrunTrainer

        return SpeedrunTrainer
