"""Every task of the lm-evaluation-harness through llmkit's engines, and llmkit's engines as a model of the harness.

`llmkit eval --tasks NAME` finds a task or group of lm-eval where llmkit has no task of that name, `lm_eval:NAME` in any
case. `llmkit lm-eval` is lm-eval's own command line, with a model `llmkit` in it.
"""

from __future__ import annotations

from collections.abc import Collection

import click

from llmkit import hookimpl
from llmkit.component import missing_modules
from llmkit.evaluator import Evaluator, TaskFamily


class LmEval(TaskFamily):
    """Every task and group of the lm-evaluation-harness, by its name there."""

    name = "lm_eval"
    requires = ("lm_eval",)

    @classmethod
    def names(cls) -> Collection[str]:
        if missing_modules(cls.requires):
            return ()
        from llmkit_lm_eval.index import load_index

        return load_index()

    @classmethod
    def find(cls, name: str) -> type[Evaluator] | None:
        if missing_modules(cls.requires):
            return None
        from llmkit_lm_eval.tasks import find_task

        return find_task(name)


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.pass_context
def lm_eval_command(context: click.Context) -> None:
    """Run lm-eval's own command line, with llmkit's engines as `--model llmkit`."""
    from llmkit.component import require

    require(LmEval.requires, "llmkit lm-eval")
    from llmkit_lm_eval.model import run_lm_eval

    run_lm_eval(context.args)


@hookimpl
def llmkit_register_task_families() -> list[type[TaskFamily]]:
    return [LmEval]


@hookimpl
def llmkit_register_commands() -> list[click.Command]:
    return [lm_eval_command]
