"""Flags made from option dataclasses, and commands whose flags depend on a component that is chosen by a flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from llmkit.options import field_types, flag_name


def flags(cls: type) -> list[click.Option]:
    """One Click option for each field of an option dataclass (see `llmkit.options.option`)."""
    types = field_types(cls)
    result = []
    for field in dataclasses.fields(cls):
        plain, optional = types[field.name]
        meta, name = field.metadata, flag_name(field)
        kwargs: dict[str, Any] = {"help": meta.get("help"), "default": None, "metavar": meta.get("metavar")}
        declaration = name
        if plain is bool:
            declaration = name if field.default is False else f"{name}/--no-{name[2:]}"
            kwargs.update(is_flag=True)
        elif meta.get("choices"):
            kwargs["type"] = click.Choice(meta["choices"])
        elif plain is int:
            kwargs["type"] = click.IntRange(min=meta.get("minimum"), max=meta.get("maximum"))
        elif plain is float:
            kwargs["type"] = click.FloatRange(min=meta.get("minimum"), max=meta.get("maximum"))
        else:
            kwargs["type"] = str
        if not optional and not (plain is bool and field.default is False):
            kwargs["help"] = f"{kwargs['help']}  [default: {field.default}]"
        if plain is not bool and kwargs["metavar"] is None and not meta.get("choices"):
            kwargs["metavar"] = {int: "N", float: "X", str: "TEXT"}[plain]
        result.append(click.Option([declaration, field.name], **kwargs))
    return result


def given(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of an option dataclass that were given on the command line; removes all of them from `values`."""
    taken = {field.name: values.pop(field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in taken.items() if value is not None}


def value_of(flag: str, args: list[str]) -> str | None:
    """What a flag is given in arguments that have not been parsed; the last one counts."""
    value = None
    for index, arg in enumerate(args):
        if arg == "--":
            break
        if arg == flag and index + 1 < len(args):
            value = args[index + 1]
        if arg.startswith(flag + "="):
            value = arg.split("=", 1)[1]
    return value


class ComponentCommand(click.Command):
    """A command whose further flags come from the component that one of its flags names.

    `selector` is that flag, e.g. `--backend`; `options_of(name)` gives the option dataclass of the component named,
    or of all components where the name is None.
    """

    def __init__(self, *args: Any, selector: str, options_of: Callable[[str | None], type], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.selector, self.options_of = selector, options_of

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["component"] = self.selected(args)
        return super().parse_args(ctx, args)

    def selected(self, args: list[str]) -> str | None:
        """The component that the arguments name."""
        return value_of(self.selector, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if "component_flags" not in ctx.meta:
            ctx.meta["component_flags"] = flags(self.options_of(ctx.meta.get("component")))
        params: list[click.Parameter] = super().get_params(ctx)
        own = len(self.params)  # behind them stands --help, which stays last
        return [*params[:own], *ctx.meta["component_flags"], *params[own:]]
