"""Engine `llmkit` keeps the contract of engines, with GPT-2 and with Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.engine import Engine
from llmkit.testing import EngineContract
from llmkit_engine.engine import EmbeddedEngine


class TestGPT2(EngineContract):
    @pytest.fixture
    def engine_class(self) -> type[Engine]:
        return EmbeddedEngine


class TestLlama(TestGPT2):
    @pytest.fixture
    def checkpoint(self, test_data: Path) -> Checkpoint:
        return Checkpoint.open(test_data / "models" / "stories260k-hf")
