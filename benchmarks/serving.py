"""Speed over HTTP beside vLLM's own server, in one run: tokens/s and time to first token at several concurrencies.

    python benchmarks/serving.py MODEL [--vllm-python PATH] [--json]

MODEL is a Llama or GPT-2 checkpoint (the project's goals are for SmolLM2-135M-Instruct). Both servers run as processes
of their own and get the same requests: streamed completions of random token ids, greedy, without end tokens. Rounds
alternate between the sides, and the best of each counts, since other work on the machine can only slow one down. The
embedded engine without HTTP, in this process, shows what HTTP costs. vLLM is null where it is not given.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.checkpoint import Checkpoint
from llmkit.engine import GenerateRequest, Sampling
from llmkit_engine.engine import EmbeddedEngine

Prompts = list[list[int]]
PROMPT_TOKENS = 16


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Side:
    """A server process. `ready_seconds` from the start of its command to its first healthy answer."""

    def __init__(self, name: str, command: list[str], model: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.name, self.model = name, model
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=self.log, stderr=self.log, env={**os.environ, **environment}
        )
        while not self._healthy():
            if self._process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(f"{name} ended at once:\n{self.log.read().decode()[-3000:]}")
            time.sleep(0.05)
        self.ready_seconds = time.perf_counter() - started
        note(f"{name}: ready after {self.ready_seconds:.1f} s")

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
            return True
        return False

    def run(self, prompts: Prompts, new_tokens: int) -> tuple[float, list[float]]:
        """Seconds for all prompts at once, and each one's time to its first token."""
        return asyncio.run(self._run(prompts, new_tokens))

    async def _run(self, prompts: Prompts, new_tokens: int) -> tuple[float, list[float]]:
        begun = time.perf_counter()
        first = await asyncio.gather(*(self._stream(ids, new_tokens) for ids in prompts))
        return time.perf_counter() - begun, first

    async def _stream(self, ids: list[int], new_tokens: int) -> float:
        body = json.dumps(
            {
                "model": self.model,
                "prompt": ids,
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        first, last = 0.0, b""
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begun
                last = line
        writer.close()
        assert json.loads(last[6:])["usage"]["completion_tokens"] == new_tokens
        return first

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.log.close()


def run_engine(engine: EmbeddedEngine, prompts: Prompts, new_tokens: int) -> float:
    """Seconds for all prompts without HTTP."""
    sampling = Sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    begun = time.perf_counter()
    for _ in engine.generate([GenerateRequest(i, tuple(ids), sampling) for i, ids in enumerate(prompts)]):
        pass
    return time.perf_counter() - begun


@contextlib.contextmanager
def servers(args: argparse.Namespace) -> Iterator[list[Side]]:
    with contextlib.ExitStack() as stack:
        sides = []
        ours = [sys.executable, "-m", "llmkit", "serve", f"model={args.model}", "--dtype", "bf16"]
        Side("llmkit", ours, "model").close()  # the first start may have to compile the engine
        side = Side("llmkit", ours, "model")
        stack.callback(side.close)
        sides.append(side)
        if args.vllm_python:
            command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model)]
            command += ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "1024"]
            command += ["--max-num-seqs", "64", "--no-enable-prefix-caching"]
            memory = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
            side = Side("vllm_cpu", command, "model", **memory)
            stack.callback(side.close)
            sides.append(side)
        yield sides


def measure(sides: list[Side], engine: EmbeddedEngine, args: argparse.Namespace) -> dict[str, Any]:
    """Of each side: tokens/s and median time to first token, by concurrency; the engine's tokens/s without HTTP."""
    rng = random.Random(0)
    speed: dict[str, dict[int, float]] = {name: {} for name in (*(side.name for side in sides), "engine")}
    first: dict[str, dict[int, float]] = {side.name: {} for side in sides}
    for side in sides:  # a warm-up, so that nobody's first request is measured
        side.run([[5] * PROMPT_TOKENS] * 2, 4)
    for concurrency in args.concurrency:
        for number in range(args.rounds):
            prompts = [[rng.randrange(3, engine.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(concurrency)]
            tokens = concurrency * args.new_tokens
            for side in sides:
                seconds, waits = side.run(prompts, args.new_tokens)
                wait = statistics.median(waits)
                speed[side.name][concurrency] = max(tokens / seconds, speed[side.name].get(concurrency, 0))
                first[side.name][concurrency] = min(wait, first[side.name].get(concurrency, wait))
                note(f"{side.name}, concurrency {concurrency}, round {number + 1}: {tokens / seconds:.1f} tokens/s, "
                     f"first token after {wait:.3f} s")  # fmt: skip
            rate = tokens / run_engine(engine, prompts, args.new_tokens)
            speed["engine"][concurrency] = max(rate, speed["engine"].get(concurrency, 0))
            note(f"engine without HTTP, concurrency {concurrency}, round {number + 1}: {rate:.1f} tokens/s")
    return {"speed": speed, "first": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vllm-python", help="a Python that has vLLM installed")
    args = parser.parse_args()
    args.model = args.model.resolve()
    with servers(args) as sides, EmbeddedEngine.open(Checkpoint.open(args.model), dtype="bf16") as engine:
        measured = measure(sides, engine, args)
    speed, first = measured["speed"], measured["first"]
    has_vllm = "vllm_cpu" in speed
    result = {
        "model": args.model.name,
        "new_tokens": args.new_tokens,
        "threads": os.cpu_count(),
        "tokens_per_second": {name: {c: round(v, 1) for c, v in by.items()} for name, by in speed.items()},
        "median_seconds_to_first_token": {name: {c: round(v, 4) for c, v in by.items()} for name, by in first.items()},
        "vs_vllm_cpu": {c: round(v / speed["vllm_cpu"][c], 2) for c, v in speed["llmkit"].items()}
        if has_vllm
        else None,
        "first_token_vs_vllm_cpu": (
            {c: round(v / first["vllm_cpu"][c], 2) for c, v in first["llmkit"].items()} if has_vllm else None
        ),
        "http_overhead": {c: round(1 - v / speed["engine"][c], 3) for c, v in speed["llmkit"].items()},
        "ready_seconds": {side.name: round(side.ready_seconds, 1) for side in sides},
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
