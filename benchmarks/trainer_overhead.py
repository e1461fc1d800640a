"""What the trainer `torch` costs beyond the same model in a bare PyTorch loop: the ratio of their times per step.

Both run in turn in one process, step by step, on batches of the same shape: machines drift, and only what is measured
side by side compares. The trainer's step is everything that a user pays for: loading, schedule, event, metrics.jsonl,
main.log.

    python benchmarks/trainer_overhead.py [--json] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llmkit.gpt2 import GPT2Config
from llmkit.plugins import get_plugins
from llmkit.testing import tiny_data
from llmkit.trainer import Step
from llmkit.training import Progress, plan, train
from llmkit_torch.model import GPT2

SHAPE = {"depth": 4, "width": 256, "heads": 4, "sequence_length": 128, "batch_size": 8, "total_batch_tokens": 1024}
WARMUP = 5


class BareLoop:
    """The same model, optimiser and arithmetic, with nothing around them."""

    def __init__(self, vocab: int) -> None:
        self.model = GPT2(GPT2Config(vocab, SHAPE["sequence_length"], SHAPE["depth"], SHAPE["heads"], SHAPE["width"]))
        self.model.initialise(42)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=1e-3, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        shape = (SHAPE["batch_size"], SHAPE["sequence_length"])
        self.inputs, self.targets = torch.randint(vocab, shape), torch.randint(vocab, shape)

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        logits = self.model(self.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began


def measure(steps: int) -> dict[str, Any]:
    """Median seconds per step of both, and the median of their ratios step by step."""
    with tempfile.TemporaryDirectory() as folder:
        data = tiny_data(Path(folder, "data"))
        options = {**SHAPE, "steps": steps + WARMUP, "dtype": "fp32", "val_every": 0, "sample_every": 0,
                   "checkpoint_every": 0, "val_batches": 1}  # fmt: skip
        planned = plan(get_plugins().trainer("torch"), options, data=data.path, out=Path(folder, "run"), resume=False)
        bare = BareLoop(data.vocab_size)
        ours: list[float] = []
        theirs: list[float] = []
        last = time.perf_counter()

        def show(progress: Progress) -> None:
            """Called after every event: what passed since the last call is the trainer's step and its recording."""
            nonlocal last
            if isinstance(progress.event, Step):
                ours.append(time.perf_counter() - last)
                theirs.append(bare.step())
            last = time.perf_counter()

        train(planned, show)
    pairs = list(zip(ours, theirs))[WARMUP:]
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "trainer_ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "bare_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "steps": steps,
        "goal": 1.05,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=60, help="steps of each side")
    args = parser.parse_args()
    result = measure(args.steps)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"trainer {result['trainer_ms']} ms, bare loop {result['bare_ms']} ms: {result['ratio']} times")


if __name__ == "__main__":
    main()
