"""A stand-in for vLLM's server: the command line, /health, a worker process, and ways to fail, started in a moment.

What it shows is how llmkit starts, watches and ends such a program; test_vllm_server.py runs the real one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SERVER = '''
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
'''


def make_python(folder: Path) -> Path:
    """A Python that has the stand-in as its `vllm`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    package = site / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for parent in (site / "vllm", package.parent, package):
        (parent / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER, "utf-8")
    return folder / "bin" / "python"
