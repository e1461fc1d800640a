"""How llmkit starts, watches and ends vLLM, with a stand-in for it: real processes, real signals, no minutes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmkit.server import Server
from llmkit.testing import ServerContract, tiny_checkpoint

PATIENCE = 120.0  # until something that should happen at once has not happened


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", width=64).path


class TestVLLMServer(ServerContract):
    @pytest.fixture
    def server(self, fake_python, tmp_path, monkeypatch) -> type[Server]:
        from llmkit_vllm.server import VLLMServer

        monkeypatch.setenv("LLMKIT_VLLM_PYTHON", str(fake_python))
        monkeypatch.setenv("FAKE_VLLM_RECORD", str(tmp_path / "record.json"))
        return VLLMServer

    @pytest.fixture
    def checkpoint(self, tmp_path):
        return tiny_checkpoint(tmp_path / "tiny", width=64)


class Serving:
    """`llmkit serve --server vllm` with the stand-in, and what that wrote down about itself."""

    def __init__(self, folder: Path, python: Path, checkpoint: Path, *args: str, mode: str = "", **extra: str) -> None:
        self.record = folder / "record.json"
        environment = {**os.environ, "FAKE_VLLM_RECORD": str(self.record), "FAKE_VLLM_MODE": mode, **extra}
        command = [sys.executable, "-m", "llmkit", "serve", "--server", "vllm", str(checkpoint), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--vllm-python", str(python), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def recorded(self) -> dict[str, Any]:
        wait_for(self.record.exists)
        found: dict[str, Any] = json.loads(self.record.read_text())
        return found

    def line(self, beginning: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"there was no line {beginning!r}")

    def end(self) -> tuple[int, str]:
        """Exit code and what was left of stderr; none of the processes may be left."""
        _, err = self.process.communicate(timeout=PATIENCE)
        wait_for(lambda: not any(psutil.pid_exists(pid) and is_alive(pid) for pid in self.recorded()["pids"]))
        return self.process.returncode, err


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def serve(tmp_path, fake_python, checkpoint) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*args: str, mode: str = "", **extra: str) -> Serving:
        started.append(Serving(tmp_path, fake_python, checkpoint, *args, mode=mode, **extra))
        return started[-1]

    yield start
    for serving in started:
        serving.process.kill()
        serving.process.communicate()
        if serving.record.exists():
            for pid in serving.recorded()["pids"]:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_no_process(serve, checkpoint, number):
    serving = serve("--alias", "gpt", "--dtype", "bf16", "--drain-seconds", "3", "--", "--max-model-len", "32")
    line = serving.line("serving")
    found = serving.recorded()
    argv = found["argv"]
    assert f"--model={checkpoint}" in argv and "--dtype=bfloat16" in argv and "--shutdown-timeout=3" in argv
    at = argv.index("--served-model-name")
    assert argv[at + 1 : at + 3] == ["tiny", "gpt"]
    assert argv[-2:] == ["--max-model-len", "32"], "what stands behind -- comes last, so that it has the last word"
    port = next(arg.split("=")[1] for arg in argv if arg.startswith("--port="))
    assert f"serving tiny, gpt at http://127.0.0.1:{port} " in line
    assert found["points"] == ["vllm.general_plugins: llmkit = llmkit_inside.plugin:register"]
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    bridge = Path(found["environment"]["PYTHONPATH"])
    assert bridge.is_dir()
    serving.process.send_signal(number)
    code, err = serving.end()
    assert code == 0 and "Traceback" not in err
    assert not bridge.exists()


def test_keys_stay_off_the_command_line(serve, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-one\nsecret-two\n")
    serving = serve("--api-key-file", str(keys), "--host", "0.0.0.0", "--cors-origin", "https://a.org, https://b.org")
    serving.line("serving")
    found = serving.recorded()
    assert "secret" not in " ".join(found["argv"])
    assert json.loads(found["environment"]["LLMKIT_INSIDE"])["api_keys"] == ["secret-one", "secret-two"]
    assert '--allowed-origins=["https://a.org", "https://b.org"]' in found["argv"]


def test_a_start_that_fails_shows_the_end_of_the_log(serve):
    serving = serve(mode="fails")
    code, err = serving.end()
    assert code == 1
    assert "error: vLLM could not be started" in err and "not enough memory" in err and "Traceback" not in err


@pytest.mark.parametrize(("mode", "what"), [("dies", "vLLM has ended by itself"), ("engine-dies", "engine has died")])
def test_its_death_is_ours_with_an_error(serve, mode, what):
    code, err = serve(mode=mode).end()
    assert code == 1 and what in err


def test_kill_of_the_front_process_is_noticed_and_leaves_nothing(serve):
    serving = serve()
    serving.line("serving")
    os.kill(serving.recorded()["pids"][0], signal.SIGKILL)
    code, err = serving.end()
    assert code == 1 and "vLLM has ended by itself" in err


@pytest.mark.parametrize("mode", ["", "never-ready"])
def test_our_own_death_by_kill_is_vllms(serve, mode):
    serving = serve(mode=mode)
    serving.recorded()
    serving.process.kill()
    serving.end()


def test_ctrl_c_while_it_starts(serve):
    serving = serve(mode="never-ready")
    serving.recorded()
    serving.process.send_signal(signal.SIGINT)
    code, err = serving.end()
    assert code == 0 and "Traceback" not in err


def test_verbose_shows_the_log(serve):
    serving = serve("--verbose")
    assert serving.line("INFO loading") == "INFO loading the weights\n"


# --- refused before anything is started


def test_bad_usage(run_cli, fake_python, checkpoint, tmp_path):
    def refused(*args: object, code: int = 1, **extra: str) -> str:
        environment = {**os.environ, "LLMKIT_VLLM_PYTHON": str(fake_python), **extra}
        return run_cli("serve", "--server", "vllm", *args, code=code, env=environment).stderr

    other = tiny_checkpoint(tmp_path / "other", width=64, seed=1).path
    assert "serves one checkpoint" in refused(checkpoint, other)
    assert "--tls-cert and --tls-key belong together" in refused(checkpoint, "--tls-cert", "x.pem")
    assert "an API key is needed" in refused(checkpoint, "--host", "0.0.0.0")
    assert "there is no program /nowhere/python" in refused(checkpoint, LLMKIT_VLLM_PYTHON="/nowhere/python")
    (tmp_path / "empty").touch()
    assert "has no key in it" in refused(checkpoint, "--api-key-file", tmp_path / "empty")
    narrow = tiny_checkpoint(tmp_path / "narrow").path
    assert "no CPU kernel for attention heads of 16 channels" in refused(narrow)
    (other / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(other)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Address already in use" in refused(checkpoint, "--port", taken.getsockname()[1])


def test_without_vllm_the_command_that_installs_it_is_named(run_cli, checkpoint, tmp_path):
    environment = {**os.environ, "LLMKIT_CACHE_DIR": str(tmp_path)}
    environment.pop("LLMKIT_VLLM_PYTHON", None)
    done = run_cli("serve", checkpoint, "--server", "vllm", code=1, env=environment)
    assert "llmkit plugins install vllm" in done.stderr
    done = run_cli("generate", checkpoint, "--engine", "vllm", "--prompt", "a", code=1, env=environment)
    assert "llmkit plugins install vllm" in done.stderr
