"""Writes the --help texts into docs/cli.md, so that they cannot drift: `make docs`. A test compares them.

Only commands and components of llmkit itself are documented, whatever else is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TARGET = DOCS / "cli.md"
COMMANDS = (
    "",
    "quickstart",
    "data prepare",
    "data info",
    "tokenizer train",
    "tokenizer eval",
    "train --backend torch",
    "train --backend llmc",
    "train --backend speedrun",
    "eval",
    "generate",
    "chat",
    "serve",
    "serve --server vllm",
    "export",
    "report",
    "plugins list",
    "plugins new",
    "plugins install",
    "plugins uninstall",
    "doctor",
)
INTRODUCTION = """\
# Command line

The help texts of all commands, as `--help` prints them. (`make docs` writes this file.)

Conventions: `--json` prints one JSON object on stdout and everything else goes to stderr. Exit code 0 is success, 1 a
failure, 2 a usage error, 130 Ctrl-C with the state saved. An error is one sentence; `--debug` shows the traceback.
"""


def render() -> str:
    """What docs/cli.md should contain."""
    parts = [INTRODUCTION]
    for command in COMMANDS:
        name = f"llmkit {command}".strip()
        parts.append(f"## `{name}`\n\n```text\n{help_text(command)}```\n")
    return "\n".join(parts)


def help_text(command: str) -> str:
    """The output of `llmkit COMMAND --help` at a width of 100 columns."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"}
    arguments = [sys.executable, "-m", "llmkit", *command.split(), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


if __name__ == "__main__":
    TARGET.write_text(render(), "utf-8")
