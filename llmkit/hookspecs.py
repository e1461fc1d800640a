"""Hooks: what a plugin can provide. Each function here is one hook, and its docstring is the contract.

A plugin is a module, named by an entry point in group `llmkit`, that implements any of these functions and marks them
with `llmkit.hookimpl`. Hooks take no arguments and return a list of classes (or commands); llmkit calls each once
a process. A module that fails to import, misspells a hook or returns something else is left out and reported; it stops
nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluggy import HookspecMarker

if TYPE_CHECKING:
    import click

    from llmkit.data.source import DataSource
    from llmkit.engine import Engine
    from llmkit.evaluator import Evaluator, TaskFamily
    from llmkit.server import Server
    from llmkit.tokenizer import TokenizerProvider
    from llmkit.trainer import Trainer

hookspec = HookspecMarker("llmkit")


@hookspec
def llmkit_register_trainers() -> list[type[Trainer]]:  # type: ignore[empty-body]
    """Training backends, chosen by `llmkit train --backend NAME`."""


@hookspec
def llmkit_register_engines() -> list[type[Engine]]:  # type: ignore[empty-body]
    """Inference engines, chosen by `--engine NAME` in `llmkit eval` and `llmkit generate`."""


@hookspec
def llmkit_register_evaluators() -> list[type[Evaluator]]:  # type: ignore[empty-body]
    """Evaluation tasks, chosen by `llmkit eval --tasks NAME,NAME`."""


@hookspec
def llmkit_register_task_families() -> list[type[TaskFamily]]:  # type: ignore[empty-body]
    """Families of evaluation tasks that are made when they are asked for, by name or as `family:name`."""


@hookspec
def llmkit_register_servers() -> list[type[Server]]:  # type: ignore[empty-body]
    """Servers, chosen by `llmkit serve --server NAME`."""


@hookspec
def llmkit_register_tokenizers() -> list[type[TokenizerProvider]]:  # type: ignore[empty-body]
    """Tokenizers that can be had by name, chosen by `llmkit data prepare --tokenizer NAME`."""


@hookspec
def llmkit_register_data_sources() -> list[type[DataSource]]:  # type: ignore[empty-body]
    """Named text sources, chosen by `llmkit data prepare NAME`."""


@hookspec
def llmkit_register_commands() -> list[click.Command]:  # type: ignore[empty-body]
    """Further subcommands of `llmkit`."""
