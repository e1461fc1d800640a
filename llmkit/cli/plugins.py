"""`llmkit plugins`: list, create, install and remove plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmkit.cli.ui import duration, emit, json_option, note, progress, table

if TYPE_CHECKING:
    from llmkit.environment import Environment


@click.group()
def command() -> None:
    """List, create, install and remove plugins."""


@command.command("list")
@json_option
def list_plugins(as_json: bool) -> None:
    """Installed plugins, what they provide, and which are broken and why."""
    from llmkit.plugins import get_plugins

    plugins = get_plugins().plugins
    environments = _environments()
    if as_json:
        emit(
            {
                "plugins": [
                    {
                        "name": p.name,
                        "module": p.module,
                        "distribution": p.distribution,
                        "version": p.version,
                        "provides": p.provides,
                        "error": p.error,
                    }
                    for p in plugins
                ],
                "environments": [
                    {"name": e.name, "version": e.version, "folder": str(e.folder)} for e in environments.values()
                ],
            }
        )
        return
    rows = []
    for p in plugins:
        provides = "; ".join(f"{kind}: {_some(names)}" for kind, names in p.provides.items())
        rows.append([p.name, f"{p.distribution} {p.version}", f"BROKEN: {p.error}" if p.error else provides])
    table(["plugin", "from", "provides"], rows)
    if environments:
        print()
        rows = [
            [e.name, e.version or "not installed", str(e.folder) if e.version else f"llmkit plugins install {e.name}"]
            for e in environments.values()
        ]
        table(["environment", "version", ""], rows)


def _environments() -> dict[str, Environment]:
    """The Python environments that components have of their own, by name."""
    from llmkit.plugins import get_plugins

    plugins = get_plugins()
    found = (component.environment for kind in ("engine", "server", "trainer") for component in plugins.all(kind))
    return {environment.name: environment for environment in found if environment is not None}


def _some(names: list[str], most: int = 8) -> str:
    """The first names; a plugin may provide dozens."""
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


@command.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(["evaluator", "trainer", "server", "engine"]), default="evaluator",
              show_default=True, help="What the plugin provides.")  # fmt: skip
@click.option("--out", "parent", type=click.Path(file_okay=False), default=".", show_default=True, metavar="DIR",
              help="Folder in which the package's folder is made.")  # fmt: skip
def new(name: str, kind: str, parent: str) -> None:
    """Create a plugin package that installs and passes its contract tests as generated."""
    from pathlib import Path

    from llmkit.template import create_plugin

    try:
        folder = create_plugin(name, kind, Path(parent))
    except FileExistsError as error:
        raise click.UsageError(f"{error}; choose another name or folder") from None
    note(f"created {folder}. Next:")
    print(f"pip install -e {folder}\npytest {folder}\nllmkit plugins list")


@command.command("install", context_settings={"ignore_unknown_options": True})
@click.argument("packages", nargs=-1, required=True)
def install(packages: tuple[str, ...]) -> None:
    """Install plugin packages into this environment with pip (names, folders, URLs, pip's own options).

    `vllm` is made in an environment of its own instead, because of the versions that it pins.
    """
    environments = _environments()
    for name in packages:
        if name in environments:
            _make_environment(environments[name])
    if rest := tuple(name for name in packages if name not in environments):
        _pip("install", rest)


def _make_environment(environment: Environment) -> None:
    import time

    started = time.monotonic()
    with progress(f"installing {environment.name}", None) as update:
        made = environment.create(lambda line: update(status=line[:120]))
    done = f"installed in {duration(time.monotonic() - started)}" if made else "is there already"
    note(f"{environment.name} {environment.version}: {done}, in {environment.folder}")


@command.command("uninstall")
@click.argument("packages", nargs=-1, required=True)
def uninstall(packages: tuple[str, ...]) -> None:
    """Remove plugin packages from this environment with pip, given by package or plugin name; or one's environment."""
    from importlib.metadata import entry_points

    from llmkit.plugins import GROUP

    environments = _environments()
    for package in packages:
        if package in environments:
            removed = environments[package].remove()
            note(f"{package}: {'removed' if removed else 'was not installed'}")
    packages = tuple(package for package in packages if package not in environments)
    if not packages:
        return
    owners = {entry.name: entry.dist.name for entry in entry_points(group=GROUP) if entry.dist}
    names = [owners.get(package, package) for package in packages]
    if "llmkit" in names:
        raise click.UsageError("that plugin is part of llmkit itself and cannot be removed alone")
    _pip("uninstall", ("--yes", *names))


def _pip(action: str, arguments: tuple[str, ...]) -> None:
    import subprocess
    import sys

    from llmkit.component import missing_modules

    if missing_modules(["pip"]):
        raise click.ClickException(
            f"this environment has no pip; use its own package manager: … {action} {' '.join(arguments)}"
        )
    code = subprocess.run([sys.executable, "-m", "pip", action, *arguments], stdout=sys.stderr).returncode
    if code:
        raise click.ClickException(f"pip {action} failed with exit code {code}; its messages are above")
