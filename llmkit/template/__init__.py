"""Plugin packages to begin with: what `llmkit plugins new NAME --kind KIND` copies.

Each kind is a folder with a module and its contract test. In them `llmkit_example` stands for the module, `Example` for
the class and `example` for the name that users type.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmkit import __version__
from llmkit.files import new_directory

HERE = Path(__file__).parent

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "llmkit-{name}"
version = "0.1.0"
description = "{kind} `{name}` for llmkit"
requires-python = ">=3.11"
dependencies = ["llmkit>={version}"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.llmkit]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""

README = """\
# llmkit-{name}

A plugin for llmkit: {kind} `{name}`.

    pip install -e .
    pytest
    llmkit plugins list
    {use}
"""

USES = {
    "evaluator": "llmkit eval CHECKPOINT --tasks {name}",
    "engine": "llmkit generate CHECKPOINT --engine {name} --prompt 'Once upon a time'",
    "trainer": "llmkit train --backend {name} --data DATA --out RUN",
    "server": "llmkit serve CHECKPOINT --server {name}",
}


def create_plugin(name: str, kind: str, parent: Path) -> Path:
    """Write the package `llmkit-NAME` into `parent` and return its folder.

    Raises ValueError for a name that cannot be used, FileExistsError where the folder is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name):
        raise ValueError(f"{name!r} cannot be a plugin's name: use a-z, 0-9 and single - or _, beginning with a letter")
    module = "llmkit_" + name.replace("-", "_")
    values = {"name": name, "kind": kind, "module": module, "version": __version__}
    values["use"] = USES[kind].format(name=name)

    def fill(source: Path) -> str:
        text = source.read_text("utf-8").replace("llmkit_example", module)
        words = "".join(word.capitalize() for word in re.split("[_-]", name))
        return re.sub(r"\bexample\b", name, re.sub(r"\bExample", words, text))

    folder = parent / f"llmkit-{name}"
    with new_directory(folder) as beside:
        (beside / "pyproject.toml").write_text(PYPROJECT.format(**values), "utf-8")
        (beside / "README.md").write_text(README.format(**values), "utf-8")
        (beside / f"{module}.py").write_text(fill(HERE / kind / "llmkit_example.py"), "utf-8")
        (beside / "tests").mkdir()
        (beside / "tests" / f"test_{module}.py").write_text(fill(HERE / kind / "contract.py"), "utf-8")
    return folder
