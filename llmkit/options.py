"""Options: dataclass fields that become command-line flags (`llmkit.cli.flags` turns them into Click options)."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    flag: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with what its flag needs.

    `help` names units; `minimum` and `maximum` are inclusive; `flag` replaces the name made from the field's name.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "maximum": maximum,
            "flag": flag,
            "metavar": metavar,
        },
    )


def field_types(cls: type) -> dict[str, tuple[type, bool]]:
    """Field name -> (plain type, may it be None) of a dataclass whose fields are simple types or `X | None`."""
    hints = typing.get_type_hints(cls)
    result = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = [arm for arm in arms if arm is not type(None)]
        if len(plain) != 1 or plain[0] not in (int, float, str, bool):
            raise TypeError(
                f"{cls.__name__}.{field.name}: an option is int, float, str or bool, or one of these or None"
            )
        result[field.name] = (plain[0], len(plain) != len(arms))
    return result


def flag_name(field: dataclasses.Field[Any]) -> str:
    """`sequence_length` -> `--sequence-length`, unless the field names its flag."""
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def check(options: Any) -> None:
    """Raise ValueError, naming the flag, for a value outside its choices or bounds."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None:
            continue
        meta, name = field.metadata, flag_name(field)
        if meta.get("choices") and value not in meta["choices"]:
            raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(meta['choices'])}")
        if meta.get("minimum") is not None and not value >= meta["minimum"]:
            raise ValueError(f"{name} is {value}, but must be at least {meta['minimum']}")
        if meta.get("maximum") is not None and not value <= meta["maximum"]:
            raise ValueError(f"{name} is {value}, but must be at most {meta['maximum']}")
