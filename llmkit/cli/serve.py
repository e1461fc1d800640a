"""`llmkit serve`: run one of the servers that plugins provide."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmkit.cli.flags import ComponentCommand, given
from llmkit.cli.ui import note
from llmkit.server import ServerOptions

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint


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


class ServeCommand(ComponentCommand):
    """Keeps what stands behind `--` apart, for servers that pass it on."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta["arguments"] = args[:at], tuple(args[at + 1 :])
        return super().parse_args(ctx, args)


@click.command("serve", cls=ServeCommand, selector="--server", options_of=_options_of)
@click.argument("checkpoints", nargs=-1, metavar="[CHECKPOINT]...")
@click.option("--server", metavar="NAME", help="Which server. [default: http]")
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME[=MODEL]",
    help="A further name of a model, by default of the first; may be given several times.",
)
def command(checkpoints: tuple[str, ...], server: str | None, aliases: tuple[str, ...], **values: Any) -> None:
    """Serve CHECKPOINTs (by default the latest run's newest) until Ctrl-C.

    A model is called what its folder is; NAME=CHECKPOINT gives it another name.
    """
    from llmkit.component import require
    from llmkit.options import check
    from llmkit.plugins import get_plugins

    chosen = get_plugins().server(server or _default(get_plugins().names("server")))
    require(chosen.requires, f"server {chosen.name!r}")
    options = chosen.Options(**given(chosen.Options, values))
    check(options)
    running = chosen()
    running.arguments = click.get_current_context().meta.get("arguments", ())
    if running.arguments and not chosen.takes_arguments:
        raise click.UsageError(f"server {chosen.name!r} takes no arguments behind --: {' '.join(running.arguments)}")
    models = add_aliases(open_models(checkpoints), aliases)
    stop = _stop_on_signals()

    def ready(url: str) -> None:
        note(f"serving {', '.join(models)} at {url} (Ctrl-C stops)")

    running.serve(models, options, ready=ready, stop=stop)


def open_models(refs: tuple[str, ...]) -> dict[str, Checkpoint]:
    """The checkpoints that the arguments name, by their names for clients. Raises UsageError where two share a name."""
    from llmkit.checkpoint import Checkpoint

    models: dict[str, Checkpoint] = {}
    for ref in refs or (None,):
        name, separator, path = (ref or "").partition("=")
        if not separator or Path(ref or "").exists():  # a path may have a = in it
            name, path = "", ref or ""
        checkpoint = Checkpoint.open(path or None)
        name = name or _name_of(path, checkpoint)
        if name in models:
            raise click.UsageError(f"two checkpoints are called {name}: name one of them, NAME=CHECKPOINT")
        models[name] = checkpoint
    return models


def _name_of(ref: str, checkpoint: Checkpoint) -> str:
    """What a model is called by default: its folder or file, its run, or its id on the hub."""
    from llmkit.checkpoint import STEP

    path = Path(ref).expanduser()
    if ref and not path.exists():
        return ref
    if checkpoint.run is None:
        return path.resolve().stem if path.is_file() else path.resolve().name
    named_step = ref and STEP.fullmatch(path.resolve().name)
    return f"{checkpoint.run.resolve().name}-{path.resolve().name}" if named_step else checkpoint.run.resolve().name


def add_aliases(models: dict[str, Checkpoint], aliases: tuple[str, ...]) -> dict[str, Checkpoint]:
    """The models with further names. Raises UsageError for a name that is taken, or a model that is not there."""
    first = next(iter(models))
    named = dict(models)
    for alias in aliases:
        name, _, model = alias.partition("=")
        if not name:
            raise click.UsageError("--alias needs a name: NAME, or NAME=MODEL")
        if (model or first) not in models:
            raise click.UsageError(f"--alias {alias}: there is no model {model} (there are: {', '.join(models)})")
        if name in named:
            raise click.UsageError(f"--alias {alias}: the name {name} is taken")
        named[name] = models[model or first]
    return named


def _stop_on_signals() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set; a second one ends the program at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop
