"""Contract tests for plugins. Subclass one and give it its one fixture; pytest does the rest.

    from llmkit.testing import EvaluatorContract
    from llmkit_demo import Demo

    class TestDemo(EvaluatorContract):
        @pytest.fixture
        def evaluator(self):
            return Demo

A contract checks what the core relies on, not whether the plugin is any good. First-party plugins pass the same ones.
"""

from llmkit.testing.data import DataSourceContract, TokenizerContract
from llmkit.testing.engine import EngineContract
from llmkit.testing.evaluator import EvaluatorContract
from llmkit.testing.server import ServerContract
from llmkit.testing.tiny import TEXT, tiny_checkpoint, tiny_data
from llmkit.testing.trainer import TrainerContract

__all__ = [
    "TEXT",
    "DataSourceContract",
    "EngineContract",
    "EvaluatorContract",
    "ServerContract",
    "TokenizerContract",
    "TrainerContract",
    "tiny_checkpoint",
    "tiny_data",
]
