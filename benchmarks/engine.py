"""Speed of the embedded engine beside its peers, in one run: tokens/s at several concurrencies, prefill, and ratios.

    python benchmarks/engine.py MODEL [--vllm-python PATH] [--llama-server PATH --gguf FILE] [--json]

MODEL is a Llama or GPT-2 checkpoint (the project's goals are for SmolLM2-135M-Instruct). Every side gets the same
random prompts, greedy, without end tokens; rounds alternate between the sides, and the best of each counts, since other
work on the machine can only slow one down. Peers that are not at hand are null.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from llmkit.checkpoint import Checkpoint
from llmkit.engine import GenerateRequest, Sampling
from llmkit_engine.engine import EmbeddedEngine
from llmkit_engine.library import library

Prompts = list[list[int]]
Side = Callable[[Prompts, int], float]  # (prompts, new tokens) -> seconds
PEER = Path(__file__).with_name("engine_peer.py")
PROMPT_TOKENS, PREFILL_TOKENS = 16, 512


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ours(checkpoint: Checkpoint, quantize: str | None) -> Iterator[Side]:
    started = time.perf_counter()
    with EmbeddedEngine.open(checkpoint, dtype="bf16", quantize=quantize) as engine:
        note(f"llmkit {quantize or 'bf16'}: opened in {time.perf_counter() - started:.2f} s")

        def run(prompts: Prompts, new_tokens: int) -> float:
            sampling = Sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True)
            requests = [GenerateRequest(i, tuple(ids), sampling) for i, ids in enumerate(prompts)]
            engine.scheduler.blocks.clear()
            begun = time.perf_counter()
            tokens = sum(len(chunk.tokens) for chunk in engine.generate(requests))
            seconds = time.perf_counter() - begun
            assert tokens == new_tokens * len(prompts)
            return seconds

        yield run


class Peer:
    """An engine_peer.py process."""

    def __init__(self, python: str, kind: str, model: Path) -> None:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            [python, str(PEER), kind, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        output: IO[str] | None = self._process.stdout
        assert output is not None
        for line in output:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"a peer ended with exit code {self._process.wait()}")

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, prompts: Prompts, new_tokens: int) -> float:
        return float(self.ask({"prompts": prompts, "new_tokens": new_tokens})["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@contextlib.contextmanager
def llama_server(program: str, gguf: str) -> Iterator[Side]:
    """llama.cpp's server; requests go to it at once, from a thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-m", gguf, "--port", str(port), "-np", "64", "-c", str(64 * 128), "-t", str(os.cpu_count())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError(f"{program} ended with exit code {process.returncode}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"{program} is not ready after two minutes")

        def post(ids: list[int], new_tokens: int) -> None:
            body = {"prompt": ids, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            request = urllib.request.Request(
                f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)
            assert answer["tokens_predicted"] == new_tokens

        def run(prompts: Prompts, new_tokens: int) -> float:
            with ThreadPoolExecutor(len(prompts)) as pool:
                begun = time.perf_counter()
                list(pool.map(post, prompts, [new_tokens] * len(prompts)))
                return time.perf_counter() - begun

        yield run
    finally:
        process.terminate()
        process.wait()


def matrix_flops(checkpoint: Checkpoint) -> int:
    """FLOPs of the matrix products of one prompt token, without the head, which prefill needs for one token only."""
    shapes = checkpoint.weights.shapes
    blocks = (name for name in shapes if ".layers." in name or ".h." in name)
    return 2 * sum(shapes[name][0] * shapes[name][1] for name in blocks if len(shapes[name]) == 2)


def measure(sides: dict[str, Side], args: argparse.Namespace, vocab: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Tokens/s of each side at each concurrency, and seconds of a prefill; the best of the rounds."""
    rng = random.Random(0)

    def prompts(count: int, length: int) -> Prompts:
        return [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]

    speeds: dict[str, Any] = {name: {} for name in sides}
    for concurrency in args.concurrency:
        for number in range(args.rounds):
            given = prompts(concurrency, PROMPT_TOKENS)
            for name, run in sides.items():
                rate = concurrency * args.new_tokens / run(given, args.new_tokens)
                speeds[name][concurrency] = round(max(rate, speeds[name].get(concurrency, 0)), 1)
                note(f"{name}, concurrency {concurrency}, round {number + 1}: {rate:.1f} tokens/s")
    prefill: dict[str, float] = {}
    for _ in range(args.rounds):
        given = prompts(1, PREFILL_TOKENS)
        for name in ("llmkit", "llmkit_int8"):
            prefill[name] = min(prefill.get(name, float("inf")), sides[name](given, 1))
    return speeds, prefill


def ratios(speeds: dict[str, Any], ours_: str, peer: str) -> dict[str, float] | None:
    if peer not in speeds:
        return None
    return {str(c): round(speeds[ours_][c] / speeds[peer][c], 2) for c in speeds[peer]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", help="a Python that has vLLM installed")
    parser.add_argument("--llama-server", help="llama.cpp's server program")
    parser.add_argument("--gguf", help="the model in Q4_1 for it")
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    if bool(args.llama_server) != bool(args.gguf):
        parser.error("--llama-server and --gguf belong together")
    checkpoint = Checkpoint.open(args.model)
    load, kinds = os.getloadavg()[0], library().lk_kinds()
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {
            "llmkit": stack.enter_context(ours(checkpoint, None)),
            "llmkit_int8": stack.enter_context(ours(checkpoint, "int8")),
        }
        gflops = None
        if not args.no_transformers:
            peer = stack.enter_context(contextlib.closing(Peer(sys.executable, "transformers", args.model)))
            sides["transformers"] = peer.run
            gflops = peer.ask({"matrix": 1024})["gflops"]
        if args.vllm_python:
            sides["vllm_cpu"] = stack.enter_context(contextlib.closing(Peer(args.vllm_python, "vllm", args.model))).run
        if args.llama_server:
            sides["llama_cpp"] = stack.enter_context(llama_server(args.llama_server, args.gguf))
        speeds, prefill = measure(sides, args, checkpoint.config["vocab_size"])
    flops = matrix_flops(checkpoint) * PREFILL_TOKENS
    rates = {name: round(flops / seconds / 1e9, 1) for name, seconds in prefill.items()}
    result = {
        "model": str(args.model.name),
        "new_tokens": args.new_tokens,
        "threads": os.cpu_count(),
        "load": round(load, 1),  # of the machine before the run: other work disturbs all sides, not all alike
        "instructions": {"bf16": bool(kinds & 4), "int8": bool(kinds & 2)},  # that the engine uses here
        "tokens_per_second": speeds,
        "vs_vllm_cpu": ratios(speeds, "llmkit", "vllm_cpu"),
        "vs_transformers": ratios(speeds, "llmkit", "transformers"),
        "int8_vs_llama_cpp": ratios(speeds, "llmkit_int8", "llama_cpp"),
        "prefill_gflops": rates,
        "matrix_gflops": gflops and {name: round(rate, 1) for name, rate in gflops.items()},
        "prefill_vs_matrix": gflops and round(rates["llmkit"] / max(gflops.values()), 2),
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, by_concurrency in speeds.items():
        print(f"{name:14}", "  ".join(f"{c}: {rate:.1f}" for c, rate in by_concurrency.items()), "tokens/s")
    print(json.dumps({key: value for key, value in result.items() if "vs" in key or "gflops" in key}, indent=2))


if __name__ == "__main__":
    main()
