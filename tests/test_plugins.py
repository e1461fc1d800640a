"""The plugin host: broken plugins are left out, named, and stop nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llmkit.plugins import GROUP, PluginError, Plugins, UnknownComponent
from llmkit.template import USES, create_plugin

GOOD = """
from llmkit import hookimpl
from llmkit.evaluator import Evaluator
class Good(Evaluator):
    "Good."
    name = "good"
    def documents(self): return []
    def requests(self, document): return []
    def score(self, document, answers): return {}
@hookimpl
def llmkit_register_evaluators(): return [Good]
"""

BROKEN = {
    "import": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "syntax": ("def f(:", "SyntaxError"),
    "exit": ("import sys; sys.exit(3)", "SystemExit"),
    "missing": ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
    "misspelt": (GOOD.replace("def llmkit_register_evaluators", "def llmkit_register_evalutors"),
                 "unknown hook 'llmkit_register_evalutors': did you mean llmkit_register_evaluators"),
    "signature": (GOOD.replace("evaluators()", "evaluators(config)"), "takes no arguments"),
    "unmarked": (GOOD.replace("@hookimpl\n", ""), "not marked with @llmkit.hookimpl"),
    "no-list": (GOOD.replace("return [Good]", "return Good"), "must return a list"),
    "foreign": (GOOD.replace("return [Good]", "return [int]"), "is not a llmkit.evaluator.Evaluator"),
    "abstract": (GOOD.replace("    def score(self, document, answers): return {}\n", ""), "does not implement score"),
    "no-name": (GOOD.replace('name = "good"', 'name = "Not Good"'), "no valid name"),
    "twice": (GOOD.replace("[Good]", "[Good, Good]"), "two items with the name 'good'"),
    "raises": (GOOD.replace("return [Good]", "1 / 0"), "ZeroDivisionError"),
    "empty": ("x = 1", "implements no hook"),
}  # fmt: skip


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a module and give its entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> EntryPoint:
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        return EntryPoint(name, name, GROUP)

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_left_out_and_the_others_stay(case, module, capsys, monkeypatch):
    source, reason = BROKEN[case]
    name = "bad_" + case.replace("-", "_")
    plugins = Plugins([module(name, source), module("llmkit_good", GOOD)])
    assert plugins.names("evaluator") == ["good"]
    assert [plugin.name for plugin in plugins.broken] == [name]
    assert reason in str(plugins.broken[0].error)
    plugins.report_broken()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and name in lines[0]

    monkeypatch.setenv("LLMKIT_STRICT", "1")
    sys.modules.pop(name, None)
    with pytest.raises(PluginError, match=name):
        Plugins([module(name, source)])


def test_of_two_plugins_with_one_name_the_later_is_left_out(module):
    plugins = Plugins([module("b_copy", GOOD), module("a_first", GOOD)])
    assert plugins.names("evaluator") == ["good"]
    assert [p.name for p in plugins.broken] == ["b_copy"]
    assert "already provided by plugin 'a_first'" in str(plugins.broken[0].error)


def test_an_unknown_name_gives_the_nearest(module):
    plugins = Plugins([module("llmkit_good", GOOD)])
    with pytest.raises(UnknownComponent, match="unknown task 'god': did you mean good"):
        plugins.evaluator("god")
    with pytest.raises(UnknownComponent, match="there are none installed"):
        plugins.trainer("torch")


def test_our_own_plugins_are_whole():
    from llmkit.plugins import get_plugins

    ours = [plugin for plugin in get_plugins().plugins if plugin.distribution == "llmkit"]
    assert ours
    assert not [plugin for plugin in ours if plugin.error]
    assert {"torch"} <= set(get_plugins().names("trainer"))


@pytest.mark.parametrize("kind", USES)
def test_a_new_plugin_passes_its_contract_as_generated(kind, tmp_path):
    folder = create_plugin(f"my-{kind}", kind, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_new_refuses_a_bad_name_and_a_taken_folder(tmp_path):
    for name in ("Upper", "1st", "a b", "../up", ""):
        with pytest.raises(ValueError, match="cannot be a plugin's name"):
            create_plugin(name, "evaluator", tmp_path)
    create_plugin("one", "evaluator", tmp_path)
    with pytest.raises(FileExistsError):
        create_plugin("one", "evaluator", tmp_path)


def test_list_as_json():
    done = subprocess.run([sys.executable, "-m", "llmkit", "plugins", "list", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plugins = {plugin["name"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    assert plugins["torch"]["provides"] == {"trainer": ["torch"]}
