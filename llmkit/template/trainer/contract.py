"""The plugin keeps the contract of llmkit's trainers."""

import pytest
from llmkit_example import Example

from llmkit.testing import TrainerContract


class TestContract(TrainerContract):
    @pytest.fixture
    def trainer(self):
        return Example
