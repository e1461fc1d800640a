"""`llmkit`: the command group, how plugins add to it, and how errors and Ctrl-C end a command.

Exit codes: 0 success, 1 failure, 2 usage error, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from llmkit import __version__
from llmkit.component import MissingRequirement, nearest

#: command -> (module in llmkit.cli, help line). The modules are imported when the command is used.
COMMANDS = {
    "quickstart": "Prepare, train, evaluate and sample a small model, offline, in minutes.",
    "data": "Turn text into token shards.",
    "tokenizer": "Train and compare tokenizers.",
    "train": "Train a model.",
    "eval": "Evaluate a checkpoint on tasks.",
    "generate": "Generate text with a checkpoint.",
    "serve": "Serve a checkpoint.",
    "export": "Convert a checkpoint to another format.",
    "report": "Write a report of a training run, or compare evaluations.",
    "plugins": "List, create, install and remove plugins.",
    "doctor": "Say what this machine can do, and how to get what is missing.",
}

#: exception classes that say in one sentence what was wrong, by their contract in this project
EXPECTED = (ValueError, OSError, MissingRequirement)


class Commands(click.Group):
    """Built-in commands by name; those of plugins are looked for only where no built-in one has the name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from llmkit.plugins import get_plugins

        return [*COMMANDS, *sorted(set(get_plugins().commands()) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module = import_module(f"llmkit.cli.{name}")
            command: click.Command = module.command
            return command
        from llmkit.plugins import get_plugins

        return get_plugins().commands().get(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            if name in COMMANDS:
                rows.append((name, COMMANDS[name]))
            elif command := self.get_command(ctx, name):
                rows.append((name, command.get_short_help_str(limit=90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = click.utils.make_str(args[0])
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"unknown command {name!r}: {nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", prog_name="llmkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Train, evaluate and serve small language models; every part is a plugin."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run the command line; the exit code. `--debug` is taken from anywhere in front of `--`."""
    # OpenMP's threads wait by spinning unless told otherwise. As soon as another program wants the cores, the threads
    # of a step wait for each other's turns: on 2 busy cores training was 3 (torch) to 5 (llmc) times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    end = args.index("--") if "--" in args else len(args)
    debug = "--debug" in args[:end]
    if debug:
        args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
    try:
        code: Any = cli.main(args=args, prog_name="llmkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:
        print("llmkit: interrupted", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("llmkit: interrupted", file=sys.stderr)
        return 130
    except click.ClickException as error:
        print(f"llmkit: error: {error.format_message()}", file=sys.stderr)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            print(f"see: {error.ctx.command_path} --help", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stdout = None  # type: ignore[assignment]  # else the interpreter complains when it flushes
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"llmkit: error: {describe(error)}", file=sys.stderr)
        from llmkit.plugins import UnknownComponent

        return 2 if isinstance(error, UnknownComponent) else 1


def describe(error: Exception) -> str:
    """An error as one sentence; one that nobody foresaw says so and how to see more."""
    from llmkit.plugins import PluginError

    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    if isinstance(error, (*EXPECTED, PluginError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
