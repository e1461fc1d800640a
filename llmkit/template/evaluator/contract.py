"""The plugin keeps the contract of llmkit's evaluators."""

import pytest
from llmkit_example import Example

from llmkit.testing import EvaluatorContract


class TestContract(EvaluatorContract):
    @pytest.fixture
    def evaluator(self):
        return Example
