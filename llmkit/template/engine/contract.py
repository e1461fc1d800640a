"""The plugin keeps the contract of llmkit's engines."""

import pytest
from llmkit_example import Example

from llmkit.testing import EngineContract


class TestContract(EngineContract):
    @pytest.fixture
    def engine_class(self):
        return Example
