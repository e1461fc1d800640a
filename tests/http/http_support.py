"""What the tests of the server share: a server in a thread of this process, and one in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from llmkit.checkpoint import Checkpoint
from llmkit_http.options import HttpOptions
from llmkit_http.server import HttpServer

SECONDS = 120  # for what takes a moment, on a machine however busy


@contextlib.contextmanager
def serving(checkpoints: Mapping[str, Checkpoint], **options: Any) -> Iterator[str]:
    """The URL of a server that is ready; afterwards it must end."""
    urls: list[str] = []
    errors: list[BaseException] = []
    ready, stop = threading.Event(), threading.Event()

    def announce(url: str) -> None:
        urls.append(url)
        ready.set()

    def serve() -> None:
        try:
            HttpServer().serve(checkpoints, HttpOptions(port=0, **options), ready=announce, stop=stop)
        except BaseException as error:  # shown by the test, which runs in another thread
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(SECONDS)
    if errors:
        raise errors[0]
    try:
        yield urls[0]
    finally:
        stop.set()
        thread.join(SECONDS)
    assert not thread.is_alive(), "the server did not stop"
    assert not errors, errors


@contextlib.contextmanager
def server_process(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`llmkit serve` in a process of its own, ready, with its URL. What it writes goes to process.stderr."""
    command = [sys.executable, "-m", "llmkit", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert " at http" in line, line + process.stderr.read()
        yield process, line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def metric(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = httpx.get(f"{url}/metrics", timeout=SECONDS).text.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert values, f"there is no metric {name}"
    return sum(values)


def wait_for_metric(url: str, name: str, value: float) -> None:
    """Wait until a metric has a value."""
    deadline = time.monotonic() + SECONDS
    while (found := metric(url, name)) != value:
        assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
        time.sleep(0.02)


def stories(test_data: Path) -> Checkpoint:
    """A real Llama of 260,000 parameters, trained on stories."""
    return Checkpoint.open(test_data / "models" / "stories260k-hf")
