"""Plugin host: finds plugins by entry point, keeps broken ones apart, and hands out components by name.

`get_plugins()` is the one for this process. First-party plugins come in by the same entry points as any other.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from llmkit import hookspecs
from llmkit.component import Component, nearest

if TYPE_CHECKING:
    import click

    from llmkit.data.source import DataSource
    from llmkit.engine import Engine
    from llmkit.evaluator import Evaluator, TaskFamily
    from llmkit.server import Server
    from llmkit.tokenizer import TokenizerProvider
    from llmkit.trainer import Trainer

GROUP = "llmkit"

#: kind (as in `plugins list`) -> (hook, module and class that every item must derive from)
KINDS = {
    "trainer": ("llmkit_register_trainers", "llmkit.trainer", "Trainer"),
    "engine": ("llmkit_register_engines", "llmkit.engine", "Engine"),
    "evaluator": ("llmkit_register_evaluators", "llmkit.evaluator", "Evaluator"),
    "task family": ("llmkit_register_task_families", "llmkit.evaluator", "TaskFamily"),
    "server": ("llmkit_register_servers", "llmkit.server", "Server"),
    "tokenizer": ("llmkit_register_tokenizers", "llmkit.tokenizer", "TokenizerProvider"),
    "data source": ("llmkit_register_data_sources", "llmkit.data.source", "DataSource"),
    "command": ("llmkit_register_commands", "click", "Command"),
}
HOOKS = {hook: kind for kind, (hook, _, _) in KINDS.items()}
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

C = TypeVar("C", bound=Component)


class PluginError(Exception):
    """A plugin is broken. Raised only under LLMKIT_STRICT=1; reported otherwise."""


class UnknownComponent(ValueError):
    """No installed plugin provides the name. The message gives the nearest names."""


@dataclass
class Plugin:
    """One entry point and what became of it."""

    name: str
    module: str
    distribution: str
    version: str
    provides: dict[str, list[str]] = field(default_factory=dict)  # kind -> names
    error: str | None = None


class Plugins:
    """The plugins of this environment, loaded from `found` entry points.

    A plugin is taken whole or not at all: one bad hook leaves out all that it provides, so that nobody runs half of it.
    """

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        self._items: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self._owner: dict[tuple[str, str], str] = {}
        for entry_point in sorted(found, key=_load_order):
            self._load(entry_point)

    def _load(self, entry_point: EntryPoint) -> None:
        dist = entry_point.dist
        plugin = Plugin(
            name=entry_point.name,
            module=entry_point.value,
            distribution=dist.name if dist else "",
            version=dist.version if dist else "",
        )
        self.plugins.append(plugin)
        try:
            module = entry_point.load()
            items = _collect(module)
            for kind, found in items.items():
                for item in found:
                    if owner := self._owner.get((kind, item.name)):
                        raise PluginError(f"{kind} {item.name!r} is already provided by plugin {owner!r}")
            self.manager.register(module, name=entry_point.name)
        except (Exception, SystemExit) as error:  # a plugin may fail in any way at all: that is its report
            plugin.error = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            if os.environ.get("LLMKIT_STRICT") == "1":
                raise PluginError(f"plugin {plugin.name!r} ({plugin.module}): {plugin.error}") from error
            return
        for kind, found in items.items():
            plugin.provides[kind] = [item.name for item in found]
            for item in found:
                self._items[kind][item.name] = item
                self._owner[kind, item.name] = plugin.name

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]

    def names(self, kind: str) -> list[str]:
        """Names of all components of a kind (a key of KINDS), sorted."""
        return sorted(self._items[kind])

    def all(self, kind: str) -> list[Any]:
        return [self._items[kind][name] for name in self.names(kind)]

    def find(self, kind: str, name: str) -> Any:
        """The component of that kind and name. Raises UnknownComponent with the nearest names."""
        try:
            return self._items[kind][name]
        except KeyError:
            word = {"trainer": "backend", "evaluator": "task"}.get(kind, kind)  # what the command line calls them
            raise UnknownComponent(f"unknown {word} {name!r}: {nearest(name, self._items[kind])}") from None

    def trainer(self, name: str) -> type[Trainer]:
        found: type[Trainer] = self.find("trainer", name)
        return found

    def engine(self, name: str) -> type[Engine]:
        found: type[Engine] = self.find("engine", name)
        return found

    def evaluator(self, name: str) -> type[Evaluator]:
        """A registered task; `family:name`; or where no task is registered by that name, a family's."""
        prefix, _, rest = name.partition(":")
        if rest:
            family: type[TaskFamily] = self.find("task family", prefix)
            if (member := family.find(rest)) is None:
                names = nearest(rest, family.names())
                raise UnknownComponent(f"unknown task {rest!r} of {prefix}: {names}")
            return member
        if name not in self._items["evaluator"]:
            families: list[type[TaskFamily]] = self.all("task family")
            for family in families:
                if (member := family.find(name)) is not None:
                    return member
            known = {*self._items["evaluator"], *(known for family in families for known in family.names())}
            raise UnknownComponent(f"unknown task {name!r}: {nearest(name, known)}")
        found: type[Evaluator] = self._items["evaluator"][name]
        return found

    def server(self, name: str) -> type[Server]:
        found: type[Server] = self.find("server", name)
        return found

    def tokenizer(self, name: str) -> type[TokenizerProvider]:
        found: type[TokenizerProvider] = self.find("tokenizer", name)
        return found

    def data_source(self, name: str) -> type[DataSource]:
        found: type[DataSource] = self.find("data source", name)
        return found

    def commands(self) -> dict[str, click.Command]:
        return dict(self._items["command"])

    def report_broken(self) -> None:
        """One line on stderr for each broken plugin."""
        for plugin in self.broken:
            reason = (plugin.error or "").split("\n", 1)[0]
            print(f"llmkit: plugin {plugin.name!r} is left out: {reason}", file=sys.stderr)


def _load_order(entry_point: EntryPoint) -> tuple[bool, str, str]:
    """Ours first, so that in a clash of names the newcomer is the one reported; then alphabetical, to be repeatable."""
    distribution = entry_point.dist.name if entry_point.dist else ""
    return (distribution != GROUP, distribution, entry_point.name)


def _collect(module: ModuleType) -> dict[str, list[Any]]:
    """Call the hooks of a plugin module; kind -> items. Raises PluginError with what is wrong."""
    marker = f"{GROUP}_impl"  # the attribute that pluggy's HookimplMarker sets
    items: dict[str, list[Any]] = {}
    for name in dir(module):
        function = getattr(module, name)
        marked = callable(function) and getattr(function, marker, None) is not None
        if not (marked or name.startswith("llmkit_register")):
            continue
        if name not in HOOKS:
            raise PluginError(f"unknown hook {name!r}: {nearest(name, HOOKS)}")
        if not marked:
            raise PluginError(f"hook {name!r} is not marked with @llmkit.hookimpl")
        arguments = pluggy._hooks.varnames(function)
        if any(arguments):
            raise PluginError(f"hook {name!r} takes no arguments, but this one has ({', '.join(sum(arguments, ()))})")
        items[HOOKS[name]] = _checked(HOOKS[name], name, function())
    if not items:
        raise PluginError(f"module {module.__name__} implements no hook of llmkit.hookspecs")
    return items


def _checked(kind: str, hook: str, found: object) -> list[Any]:
    """Check what a hook returned against its kind."""
    if not isinstance(found, list):
        raise PluginError(f"hook {hook!r} must return a list, not {type(found).__name__}")
    _, base_module, base_name = KINDS[kind]
    base = getattr(import_module(base_module), base_name)
    seen: set[str] = set()
    for item in found:
        fits = isinstance(item, base) if kind == "command" else isinstance(item, type) and issubclass(item, base)
        if not fits:
            raise PluginError(f"hook {hook!r} returned {item!r}, which is not a {base_module}.{base_name}")
        name = item.name
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PluginError(f"{kind} {item!r} has no valid name: {name!r} (use a-z, 0-9, - and _)")
        if name in seen:
            raise PluginError(f"hook {hook!r} returned two items with the name {name!r}")
        if abstract := getattr(item, "__abstractmethods__", None):
            raise PluginError(f"{kind} {name!r} does not implement {', '.join(sorted(abstract))}")
        seen.add(name)
    return found


@cache
def get_plugins() -> Plugins:
    """The plugins of this environment, loaded on first use; broken ones are reported on stderr once."""
    plugins = Plugins(entry_points(group=GROUP))
    plugins.report_broken()
    return plugins
