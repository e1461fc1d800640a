"""The plugin keeps the contract of llmkit's servers."""

import pytest
from llmkit_example import Example

from llmkit.testing import ServerContract


class TestContract(ServerContract):
    @pytest.fixture
    def server(self):
        return Example
