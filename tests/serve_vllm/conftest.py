"""vLLM for tests: the real one in its environment, and a stand-in for its server that starts in a moment.

The stand-in has the command line, /health, a worker process, and ways to fail: enough to see how llmkit starts, watches
and ends such a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

SERVER = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points

record = os.environ["FAKE_VLLM_RECORD"]
mode = os.environ.get("FAKE_VLLM_MODE", "")
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
points = [f"{p.group}: {p.name} = {p.value}" for p in entry_points(group="vllm.general_plugins")]
points += [f"{p.group}: {p.name} = {p.value}" for p in entry_points(group="llmkit.architectures")]
kept = ("LLMKIT_INSIDE", "VLLM_CPU_KVCACHE_SPACE", "PYTHONPATH", "HF_HUB_OFFLINE")
with open(record + ".part", "w") as file:
    json.dump({"argv": sys.argv[1:], "pids": [os.getpid(), worker.pid], "points": points,
               "environment": {name: os.environ.get(name) for name in kept}}, file)
os.rename(record + ".part", record)
print("INFO loading the weights", flush=True)
if mode == "fails":
    print("ValueError: there is not enough memory", flush=True)
    sys.exit(1)
if mode == "never-ready":
    time.sleep(600)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "engine-dies" and served.is_set() else 200)
        self.end_headers()
        served.set()

    def log_message(self, *_):
        pass


import threading
served = threading.Event()
options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if argument.startswith("--") and "=" in argument)
server = ThreadingHTTPServer((options["host"], int(options["port"])), Handler)
if mode == "dies":
    threading.Timer(1, lambda: os._exit(3)).start()
server.serve_forever()
"""


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of a real vLLM, in the environment that `llmkit plugins install vllm` makes: once, minutes, 3.5 GB."""
    if named := os.environ.get("LLMKIT_VLLM_PYTHON"):
        return Path(named)
    cache = platformdirs.user_cache_path("llmkit-tests")
    command = [sys.executable, "-m", "llmkit", "plugins", "install", "vllm"]
    done = subprocess.run(
        command, env={**os.environ, "LLMKIT_CACHE_DIR": str(cache)}, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        pytest.skip(f"vLLM cannot be installed here: {done.stderr}")
    return cache / "environments" / "vllm" / "bin" / "python"


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the stand-in as its `vllm`."""
    folder = tmp_path_factory.mktemp("fake") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    package = site / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for parent in (site / "vllm", package.parent, package):
        (parent / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER, "utf-8")
    return folder / "bin" / "python"
