"""The whole chain from the command line, and third-party plugins in it, without touching llmkit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.testing import tiny_checkpoint

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An environment with two third-party packages installed: a new evaluator, and one that raises on import."""
    from llmkit.template import create_plugin

    base = tmp_path_factory.mktemp("packages")
    site = base / "site"
    demo = create_plugin("demo", "evaluator", base)
    broken = create_plugin("broken", "evaluator", base)
    (broken / "llmkit_broken.py").write_text("raise RuntimeError('written in a hurry')\n")
    for folder in (demo, broken):
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
             "--target", str(site), str(folder)],
            check=True,
        )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(site), "DEMO": str(demo)}


def test_a_new_evaluator_is_installed_tested_and_used(run_cli, environment, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", environment["DEMO"]],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_cli("eval", checkpoint.path, "--tasks", "demo", "--json", env=environment)
    result = json.loads(done.stdout)["results"]["demo"]
    assert result["n"] == 36 and 0 <= result["acc"] <= 1


def test_with_a_broken_plugin_every_command_still_works(run_cli, environment, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    for args in (
        ["--help"],
        ["plugins", "list"],
        ["train", "--backend", "torch", "--help"],
        ["generate", checkpoint.path, "--prompt", "12", "--max-tokens", "4", "--json"],
        ["eval", checkpoint.path, "--tasks", "demo", "--limit", "2", "--json"],
        ["doctor", "--offline"],
    ):
        done = run_cli(*args, env=environment)
        lines = [line for line in done.stderr.splitlines() if "broken" in line]
        assert len(lines) == 1, done.stderr
        assert "plugin 'broken' is left out: RuntimeError: written in a hurry" in lines[0]
    listed = json.loads(run_cli("plugins", "list", "--json", env=environment).stdout)["plugins"]
    assert [p["error"] for p in listed if p["name"] == "broken"] == ["RuntimeError: written in a hurry"]
    strict = {**environment, "LLMKIT_STRICT": "1"}
    done = run_cli("plugins", "list", env=strict, code=1)
    assert "plugin 'broken'" in done.stderr


def test_plugins_install_and_uninstall(run_cli, tmp_path):
    """In a virtual environment of its own that sees this one's packages, so that nothing here changes."""
    from llmkit.template import create_plugin

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    outer = [path for path in sys.path if path and not path.endswith((".zip", "lib-dynload"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(outer)}
    folder = create_plugin("other", "evaluator", tmp_path)

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), "-m", "llmkit", *map(str, args)], capture_output=True, text=True, env=environment
        )

    done = run("plugins", "install", "--no-deps", "--no-build-isolation", "--no-index", folder)
    assert done.returncode == 0, done.stderr
    assert "other" in {p["name"] for p in json.loads(run("plugins", "list", "--json").stdout)["plugins"]}
    done = run("plugins", "uninstall", "other")
    assert done.returncode == 0, done.stderr
    assert "other" not in {p["name"] for p in json.loads(run("plugins", "list", "--json").stdout)["plugins"]}
    assert run("plugins", "uninstall", "torch").returncode == 2  # part of llmkit itself
    assert run("plugins", "install", "--no-index", "llmkit-no-such-package").returncode == 1


def test_quickstart_goes_through_the_chain_and_goes_on_where_it_was(run_cli, tmp_path, monkeypatch):
    """The real command with a smaller model, so that the suite stays short."""
    code = (
        "import llmkit.quickstart as q, sys\n"
        "q.OPTIONS.update(depth=1, width=64, heads=1, steps=12, val_every=6, checkpoint_every=6, sequence_length=64)\n"
        "q.OPTIONS.update(total_batch_tokens=512, warmup_steps=2)\n"
        "q.EVAL_DOCUMENTS = 2\n"
        "from llmkit.cli.main import main\n"
        f"main(['quickstart', '--backend', 'torch', '--json', '--out', {str(tmp_path / 'q')!r}])"
    )
    first = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    outcome = json.loads(first.stdout)
    assert outcome["val_bpb"] < outcome["untrained_bpb"]
    assert outcome["results"]["bpb"]["n"] == 2
    assert [sample["prompt"] for sample in outcome["samples"]] == ["The", "def", "class"]
    report = Path(outcome["report"]).read_text("utf-8")
    assert "untrained" in report and "![" in report and "## Evaluation" in report
    assert (tmp_path / "q" / "loss.png").is_file()
    assert Checkpoint.open(tmp_path / "q" / "run").step == 12
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "is there already" in again.stderr and "is finished already" in again.stderr
    assert json.loads(again.stdout)["val_bpb"] == outcome["val_bpb"]


def test_doctor_says_what_there_is(run_cli):
    findings = {f["topic"]: f for f in json.loads(run_cli("doctor", "--offline", "--json").stdout)["findings"]}
    assert findings["PyTorch"]["state"] == "ok"
    assert findings["trainer torch"]["state"] == "ok"
    assert {"C compiler", "GPU", "hub", "machine"} <= set(findings)
    assert all(f["advice"] for f in findings.values() if f["state"] == "broken")


def test_serve_runs_a_plugin_server_until_it_is_told_to_stop(tmp_path):
    import signal
    import urllib.request

    from llmkit.template import create_plugin

    folder = create_plugin("mini", "server", tmp_path)
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", str(site), str(folder)],
        check=True,
    )  # fmt: skip
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "serve", str(checkpoint.path), "--server", "mini", "--port", "0",
         "--max-tokens", "5"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    assert " at http://127.0.0.1:" in line, line
    url = line.split(" at ")[1].split()[0]
    with urllib.request.urlopen(urllib.request.Request(url, data=b"12 and", method="POST"), timeout=60) as response:
        assert response.status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
