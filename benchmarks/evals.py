"""llmkit's tasks beside the lm-evaluation-harness (HFLM), one process, one checkpoint in bf16, the same documents.

The harness computes in whichever of bf16 and fp32 PyTorch multiplies faster here, unless --harness-dtype says: on a
processor without bf16 instructions bf16 would be several times slower, and the comparison would flatter us.

    python benchmarks/evals.py MODEL --json
    python benchmarks/evals.py MODEL --data-dir DIR --rounds 1 --scale 0.25      # a quick look

Ratios are the harness's seconds over llmkit's. Timed is from documents to results on both sides: making prompts,
tokenising, computing, scoring. Loading the model and reading the data are left out on both. Rounds alternate who goes
first, and the best of each side counts, since other work on the machine can only slow one down. llmkit forgets the
prompts of the round before. The harness shows the examples that llmkit draws, so that prompts are identical.

first_result_seconds: from the command `llmkit eval --tasks hellaswag` to its first finished document, all included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.checkpoint import Checkpoint
from llmkit.evaldata import draw, json_lines
from llmkit.evaluation import Evaluation
from llmkit.evaluator import EvalContext
from llmkit.plugins import get_plugins
from llmkit_engine.engine import EmbeddedEngine

BATCH = 16  # of the harness
MMLU = ("mmlu_high_school_world_history", "mmlu_anatomy", "mmlu_college_physics")  # long, short and middling questions


@dataclass(frozen=True, slots=True)
class Workload:
    """Tasks that both sides have, with how many documents of each and examples."""

    tasks: tuple[str, ...]
    documents: int
    shots: int


WORKLOADS = {
    "mmlu": Workload(MMLU, 40, 5),
    "hellaswag": Workload(("hellaswag",), 200, 0),
    "arc_easy": Workload(("arc_easy",), 200, 0),
    "gsm8k": Workload(("gsm8k",), 16, 5),
}


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds, and the first metric of each task."""

    seconds: float
    figures: dict[str, float]


Side = Callable[[Workload, int], Timed]


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def llmkit_side(engine: EmbeddedEngine, checkpoint: Checkpoint, data: Path) -> Side:
    def run(workload: Workload, documents: int) -> Timed:
        engine.scheduler.blocks.clear()  # nothing is left of the round before
        evaluation = Evaluation(checkpoint, workload.tasks, limit=documents, num_fewshot=workload.shots, data_dir=data)
        for task in evaluation.tasks.values():
            if workload.shots:
                getattr(task, "pool", None)  # reads the data that examples come from
        started = time.perf_counter()
        for _ in evaluation.run(engine):
            pass
        results = evaluation.results()["results"]
        seconds = time.perf_counter() - started
        return Timed(seconds, {task: next(iter(results[task].values())) for task in workload.tasks})

    return run


def faster_dtype() -> str:
    """Of bfloat16 and float32, what PyTorch multiplies matrices of the model's sizes faster in."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(20):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        seconds[str(dtype).removeprefix("torch.")] = min(times)
    return min(seconds, key=lambda name: seconds[name])


def harness_side(path: Path, checkpoint: Checkpoint, data: Path, dtype: str) -> Side:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(path), device="cpu", dtype=dtype, batch_size=BATCH)

    def run(workload: Workload, documents: int) -> Timed:
        context = EvalContext(checkpoint, checkpoint.tokenizer, data, num_fewshot=workload.shots)
        tasks: dict[str, Any] = {}
        for name in workload.tasks:
            tasks[name] = getattr(get_plugins().evaluator(f"lm_eval:{name}")(context), "task")  # noqa: B009
        if "gsm8k" in tasks:
            _show_our_examples(tasks["gsm8k"], data / "gsm8k" / "train.jsonl")
        started = time.perf_counter()
        results = lm_eval.evaluate(model, {"tasks": tasks}, limit=documents, bootstrap_iters=0)["results"]
        seconds = time.perf_counter() - started
        return Timed(seconds, {name: _first_metric(results[name]) for name in workload.tasks})

    return run


def _show_our_examples(task: Any, train: Path) -> None:
    pool = [{"question": row["question"], "answer": row["answer"]} for _, row in json_lines(train)]

    def sample(n: int, eval_doc: Mapping[str, Any] | None = None, **_: Any) -> Sequence[Any]:
        assert eval_doc is not None
        own = {"question": eval_doc["question"], "answer": eval_doc["answer"]}
        return draw(pool, n, 1234, eval_doc["question"], [own])

    task.fewshot_cfg.split = task.config.test_split  # only then does it tell the sampler the document
    task.sampler.sample = sample


def _first_metric(results: Mapping[str, Any]) -> float:
    return next(value for name, value in results.items() if "," in name and isinstance(value, float))


def first_result_seconds(model: Path, data: Path) -> float:
    """From starting the command to the first line of its samples file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "llmkit", "eval", str(model), "--tasks", "hellaswag", "--no-cache"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--data-dir", str(data), "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        samples = out.with_name("results.samples.jsonl")
        try:
            while not (samples.is_file() and samples.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def measure(sides: Mapping[str, Side], rounds: int, scale: float) -> dict[str, dict[str, Timed]]:
    """workload -> side -> the best of the rounds."""
    best: dict[str, dict[str, Timed]] = {name: {} for name in WORKLOADS}
    for number in range(rounds):
        for name, workload in WORKLOADS.items():
            documents = max(1, round(workload.documents * scale))
            for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                timed = sides[side](workload, documents)
                note(f"{name}, {side}, round {number + 1}: {timed.seconds:.2f} s {timed.figures}")
                if side not in best[name] or timed.seconds < best[name][side].seconds:
                    best[name][side] = timed
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=os.environ.get("LLMKIT_SMOLLM2"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("LLMKIT_TEST_DATA", "../shared/data"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--harness-dtype", choices=("bfloat16", "float32"), help="default: the faster one here")
    parser.add_argument("--scale", type=float, default=1.0, help="this share of the documents")
    args = parser.parse_args()
    if args.model is None:
        parser.error("name the model's folder, or set LLMKIT_SMOLLM2")
    model, data = Path(args.model), Path(args.data_dir)
    first = min(first_result_seconds(model, data) for _ in range(args.rounds))
    note(f"first result after {first:.2f} s")
    checkpoint, harness_dtype = Checkpoint.open(model), args.harness_dtype or faster_dtype()
    with EmbeddedEngine.open(checkpoint, dtype="bf16") as engine:
        sides = {
            "llmkit": llmkit_side(engine, checkpoint, data),
            "lm_eval": harness_side(model, checkpoint, data, harness_dtype),
        }
        best = measure(sides, args.rounds, args.scale)
    result: dict[str, Any] = {
        f"{name}_vs_lm_eval": round(timed["lm_eval"].seconds / timed["llmkit"].seconds, 2)
        for name, timed in best.items()
    }
    result["first_result_seconds"] = round(first, 2)
    result["seconds"] = {name: {s: round(t.seconds, 2) for s, t in timed.items()} for name, timed in best.items()}
    result["figures"] = {name: {s: t.figures for s, t in timed.items()} for name, timed in best.items()}
    result |= {
        "model": model.name,
        "dtype": "bf16",
        "harness_dtype": harness_dtype,
        "threads": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
