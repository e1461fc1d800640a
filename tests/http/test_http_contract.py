"""The server keeps the contract of servers."""

import pytest

from llmkit.testing import ServerContract
from llmkit_http.server import HttpServer


class TestContract(ServerContract):
    @pytest.fixture
    def server(self):
        return HttpServer
