"""Backend llmc beside PyTorch: GPT-2 124M, one optimiser step, and matrix products beside the processor's peak.

python benchmarks/llmc.py [--json] [--rounds N] [--llmc-reference EXECUTABLE]

Each contestant is a process of its own that does one step when told to, in turn with the other, so that both see the
same machine. A ratio is that of the medians; above 1, llmc is faster. PyTorch is this project's own `torch` backend:
eager, scaled_dot_product_attention, fused AdamW. Memory is the peak of the process, libraries included.

Neither side clips gradients, as llm.c's CPU program does not; "clipped" has the figures with both clipping to norm 1,
for which llmc has to store the gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "trainers")]

from llmkit.gpt2 import GPT2Config  # noqa: E402

GPT2_124M = GPT2Config(vocab=50257, context=1024, depth=12, heads=12, width=768)
SHAPES = {"": (4, 64), "_t1024": (1, 1024)}
RATE, DECAY, CLIP, BETAS, EPSILON = 1e-4, 0.1, 1.0, (0.9, 0.95), 1e-8
#: (tokens, outputs, inputs) of the products of a layer, and of the classifier
PRODUCTS = [(n, o, i) for n in (256, 1024) for o, i in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]


def worker(contestant: str, dtype: str, batch: int, length: int, threads: int, clip: int) -> None:
    """Does one step for each line on stdin and prints its seconds; at the end, the peak memory in bytes."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, GPT2_124M.vocab, (batch, length)) for _ in range(2))
    step = (llmc_step if contestant == "llmc" else torch_step)(dtype, x, y, threads, clip)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)
    print(json.dumps({"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


def llmc_step(dtype: str, x: Any, y: Any, threads: int, clip: int) -> Any:
    from llmkit_llmc.library import AdamW, Model, load

    model = Model(load(), GPT2_124M, dtype=dtype, threads=threads)
    model.initialise(42)
    done = 0

    def step() -> float:
        nonlocal done
        done += 1
        how = AdamW(RATE, *BETAS, EPSILON, DECAY, 1.0, done, done)
        if not clip:
            return model.step(x, y, how, scale=1 / x.size)[0]
        loss = model.gradient(x, y, scale=1 / x.size, accumulate=False)
        how.grad_scale = min(1.0, CLIP / model.grad_square() ** 0.5)
        model.update(how)
        return loss

    return step


def torch_step(dtype: str, x: Any, y: Any, threads: int, clip: int) -> Any:
    import torch

    from llmkit_torch.model import GPT2
    from llmkit_torch.trainer import make_optimiser

    torch.set_num_threads(threads)
    model = GPT2(GPT2_124M)
    model.initialise(42)
    options = argparse.Namespace(weight_decay=DECAY, learning_rate=RATE)
    optimiser = make_optimiser(model, options)  # type: ignore[arg-type]
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(inputs, targets)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Contestant:
    """A worker process."""

    def __init__(self, name: str, dtype: str, batch: int, length: int, threads: int, clip: bool) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
        numbers = [str(n) for n in (batch, length, threads, int(clip))]
        command = [sys.executable, __file__, "--worker", name, dtype, *numbers]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(threads)},
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])

    def finish(self) -> float:
        """Peak memory in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        memory = self._answer()["memory"]
        self._process.wait()
        return memory


def race(dtype: str, batch: int, length: int, rounds: int, threads: int, *, clip: bool) -> dict[str, Any]:
    """Median seconds of both, their ratio and that of their memory. The first two rounds warm up."""
    llmc, torch = (Contestant(name, dtype, batch, length, threads, clip) for name in ("llmc", "torch"))
    for _ in range(rounds + 2):
        llmc.step()
        torch.step()
    medians = [statistics.median(c.seconds[2:]) for c in (llmc, torch)]
    memory = [c.finish() for c in (llmc, torch)]
    ratio, sizes = medians[1] / medians[0], " and ".join(f"{m / 1e9:.2f} GB" for m in memory)
    seconds = f"llmc {medians[0]:.3f} s, torch {medians[1]:.3f} s"
    say(f"{dtype} {batch} x {length}{' clipped' * clip}: {seconds}: {ratio:.2f}x; memory {sizes}")
    say(f"    losses {llmc.losses[-1]:.4f} and {torch.losses[-1]:.4f}")
    return {"llmc": medians[0], "ratio": medians[1] / medians[0], "memory": memory[0] / memory[1]}


def products(dtype: str, threads: int, rounds: int) -> float:
    """FLOP/s of the three products of each linear layer, together, as a fraction of the peak; the best of both."""
    from llmkit_llmc.kernels import Kernels, matrix
    from llmkit_llmc.library import DTYPES, load

    library = load()
    kernels = Kernels(library, threads)
    kind = np.uint16 if dtype == "bf16" else np.float32
    rng = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        numbers = rng.standard_normal(shape, np.float32)
        return (numbers.view(np.uint32) >> 16).astype(np.uint16) if kind is np.uint16 else numbers

    peak, rates = 0.0, []
    for n, outputs, inputs in PRODUCTS:
        x, w, y, dw = (
            values(n, inputs),
            values(outputs, inputs),
            values(n, outputs),
            np.zeros((outputs, inputs), np.float32),
        )
        dx = np.zeros_like(x)
        calls = [
            (outputs, n, inputs, matrix(w), matrix(x, transposed=True), matrix(np.zeros_like(y), transposed=True)),
            (outputs, inputs, n, matrix(y, transposed=True), matrix(x), matrix(dw)),
            (inputs, n, outputs, matrix(w, transposed=True), matrix(y, transposed=True), matrix(dx, transposed=True)),
        ]
        for call in calls:
            kernels.gemm(*call)
        rate = 0.0
        for _ in range(3 * rounds):
            peak = max(peak, library.llmc_machine_peak(threads, DTYPES[dtype], ctypes.c_double(0.01)))
            began = time.perf_counter()
            for call in calls:
                kernels.gemm(*call)
            rate = max(rate, 3 * 2 * n * outputs * inputs / (time.perf_counter() - began))
        rates.append(rate)
        say(f"{dtype} product {n} x {outputs} x {inputs}: {rate / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f}")
    kernels.close()
    return statistics.mean(rates) / peak


def measure(results: dict[str, Any], suffix: str, outcome: dict[str, Any], dtype: str) -> None:
    """Enter the outcome of a race."""
    results[f"{dtype}_vs_torch{suffix}"] = outcome["ratio"]
    if dtype == "fp32":
        results[f"memory_vs_torch{suffix}"] = outcome["memory"]
        results[f"llmc_seconds{suffix}"] = outcome["llmc"]


def rounded(value: Any, digits: int) -> Any:
    """Every number in it, rounded."""
    if isinstance(value, dict):
        return {name: rounded(one, digits) for name, one in value.items()}
    return value if value is None else round(value, digits)


def compile_seconds() -> float:
    """From nothing to a loadable library."""
    from llmkit_llmc import build

    with tempfile.TemporaryDirectory() as folder:
        tools = build.toolchain()
        began = time.perf_counter()
        build.compile_all(tools, Path(folder))
        return time.perf_counter() - began


def reference_seconds(executable: Path, threads: int) -> float:
    """Median seconds of a step of llm.c's CPU program (B=4, T=64), on files written for it."""
    from llmkit_llmc.library import Model, load

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Model(load(), GPT2_124M)
        model.initialise(42)
        model.write(folder / "gpt2_124M.bin")
        model.close()
        data = folder / "dev" / "data" / "tinyshakespeare"
        data.mkdir(parents=True)
        for split in ("train", "val"):
            tokens = np.random.default_rng(0).integers(0, GPT2_124M.vocab, 40_000).astype("<u2")
            head = np.zeros(256, "<i4")
            head[:3] = (20240520, 1, len(tokens))
            (data / f"tiny_shakespeare_{split}.bin").write_bytes(head.tobytes() + tokens.tobytes())
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            ["stdbuf", "-oL", str(executable.resolve())], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        seconds: list[float] = []
        for line in process.stdout:
            if match := re.search(r"step \d+: train loss .*took ([\d.]+) ms", line):
                seconds.append(float(match[1]) / 1000)
            if len(seconds) == 4:
                break
        process.kill()
        process.wait()
        return statistics.median(seconds[1:])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llmc-reference", type=Path, help="llm.c's train_gpt2, to compare with too")
    parser.add_argument("--only", help="a part: step, t1024, products, compile")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, dtype, *numbers = options.worker
        worker(name, dtype, *(int(n) for n in numbers))
        return
    results: dict[str, Any] = {}
    only = options.only
    if only in (None, "compile"):
        results["compile_seconds"] = compile_seconds()
    clipped: dict[str, Any] = {}
    for suffix, (batch, length) in SHAPES.items():
        if only not in (None, "t1024" if suffix else "step"):
            continue
        rounds = max(3, options.rounds // 2) if suffix else options.rounds
        for dtype in ("fp32", "bf16"):
            measure(results, suffix, race(dtype, batch, length, rounds, options.threads, clip=False), dtype)
        measure(clipped, suffix, race("fp32", batch, length, rounds, options.threads, clip=True), "fp32")
    if clipped:
        results["clipped"] = clipped
    if only in (None, "products"):
        for dtype in ("fp32", "bf16"):
            results[f"{dtype}_gemm_of_peak"] = products(dtype, options.threads, options.rounds)
    results["llmc_reference_ratio"] = None
    if options.llmc_reference:
        results["llmc_reference_ratio"] = (
            reference_seconds(options.llmc_reference, options.threads) / results["llmc_seconds"]
        )
    for name, value in results.items():
        say(f"{name}: {rounded(value, 3)}")
    if options.json:
        print(json.dumps(rounded(results, 4)))


if __name__ == "__main__":
    main()
