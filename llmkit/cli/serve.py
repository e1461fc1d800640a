"""`llmkit serve`: run one of the servers that plugins provide."""

from __future__ import annotations

import signal
import threading
from typing import Any

import click

from llmkit.cli.flags import ComponentCommand, given
from llmkit.cli.ui import note
from llmkit.server import ServerOptions


def _options_of(server: str | None) -> type[ServerOptions]:
    from llmkit.plugins import get_plugins

    names = get_plugins().names("server")
    server = server or (_default(names) if names else None)
    return get_plugins().server(server).Options if server else ServerOptions


def _default(names: list[str]) -> str:
    """`http` where it is installed, else the only one there is."""
    if "http" in names or len(names) == 1:
        return "http" if "http" in names else names[0]
    if not names:
        raise ValueError("no server is installed: llmkit plugins install a package that provides one")
    raise click.UsageError(f"--server is missing: choose one of {', '.join(names)}")


@click.command("serve", cls=ComponentCommand, selector="--server", options_of=_options_of)
@click.argument("checkpoint", required=False)
@click.option("--server", metavar="NAME", help="Which server. [default: http]")
def command(checkpoint: str | None, server: str | None, **values: Any) -> None:
    """Serve CHECKPOINT (by default the latest run's newest) until Ctrl-C."""
    from llmkit.checkpoint import Checkpoint
    from llmkit.component import require
    from llmkit.options import check
    from llmkit.plugins import get_plugins

    chosen = get_plugins().server(server or _default(get_plugins().names("server")))
    require(chosen.requires, f"server {chosen.name!r}")
    options = chosen.Options(**given(chosen.Options, values))
    check(options)
    opened = Checkpoint.open(checkpoint)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def ready(url: str) -> None:
        note(f"serving {opened.path} at {url} (Ctrl-C stops)")

    chosen().serve(opened, options, ready=ready, stop=stop)
