"""Server `http`: an OpenAI-compatible server over any engine, with a page to chat in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit import hookimpl

if TYPE_CHECKING:
    from llmkit.server import Server


@hookimpl
def llmkit_register_servers() -> list[type[Server]]:
    from llmkit_http.server import HttpServer

    return [HttpServer]
