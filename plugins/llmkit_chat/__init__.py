"""`llmkit chat`: talks to a model in the terminal, loaded here or behind a server."""

from __future__ import annotations

import click

from llmkit import hookimpl
from llmkit_chat.command import command


@hookimpl
def llmkit_register_commands() -> list[click.Command]:
    return [command]
