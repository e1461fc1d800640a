"""The documentation is true: hooks with their exact signatures, examples that run, help texts that have not drifted."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from llmkit import hookspecs
from llmkit.plugins import HOOKS, Plugins

DOCS = Path(__file__).resolve().parents[1] / "docs"


def signature(hook: str) -> str:
    function = getattr(hookspecs, hook)
    return f"def {hook}{inspect.signature(function)}".replace("'", "")


def test_the_hooks_of_the_host_are_those_of_the_specification():
    specified = {name for name, value in vars(hookspecs).items() if hasattr(value, "llmkit_spec")}
    assert specified == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(hook):
    assert getattr(hookspecs, hook).__doc__
    page = (DOCS / "hooks" / f"{hook}.md").read_text("utf-8")
    assert f"```python\n{signature(hook)}\n```" in page
    assert f"hooks/{hook}.md" in (DOCS / "plugins.md").read_text("utf-8")


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_every_hook_runs(hook, tmp_path, monkeypatch):
    page = (DOCS / "hooks" / f"{hook}.md").read_text("utf-8")
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    name = f"example_of_{hook}"
    (tmp_path / f"{name}.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Plugins([EntryPoint(name, name, "llmkit")])
    assert not plugins.broken, plugins.broken[0].error
    assert plugins.names(HOOKS[hook])


def test_the_help_texts_in_the_docs_have_not_drifted():
    update: Any = runpy.run_path(str(DOCS / "update.py"))
    assert update["TARGET"].read_text("utf-8") == update["render"](), "run: make docs"


def test_links_between_documents_lead_somewhere():
    pages = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


HEAVY = ("torch", "numpy", "transformers", "datasets", "tokenizers", "tiktoken", "rich", "pyarrow", "matplotlib")


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--backend", "torch", "--help"], ["plugins", "list"], ["eval", "--list"]]
)
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom llmkit.cli.main import run\n"
        f"assert run({args!r}) == 0\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


def test_the_example_in_the_readme_runs(tmp_path, monkeypatch):
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    (tmp_path / "readme_example.py").write_text(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Plugins([EntryPoint("readme_example", "readme_example", "llmkit")])
    assert plugins.names("evaluator") == ["parity"], plugins.broken
