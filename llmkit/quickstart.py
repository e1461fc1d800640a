"""Quickstart: the whole chain on text that every machine has, offline, in minutes.

Each stage is skipped when its result is there already, so that an interrupted quickstart goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A model that two CPU cores train in two to three minutes with PyTorch. Width, vocabulary and batch were chosen by
#: validation bits per byte after a fixed time.
VOCAB_SIZE = 4096
VAL_FRACTION = 0.05
OPTIONS = {
    "depth": 4,
    "width": 192,
    "heads": 3,
    "sequence_length": 256,
    "batch_size": 8,
    "total_batch_tokens": 4096,
    "steps": 400,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "val_every": 100,
    "sample_every": 0,
    "checkpoint_every": 100,
    "keep_last": 2,
}
PROMPTS = ("The", "def", "class")  # no space behind: a word's token begins with its space
EVAL_DOCUMENTS = 8


@dataclass(frozen=True)
class Stages:
    """Where the quickstart keeps its things."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def report(self) -> Path:
        return self.folder / "report.md"


def finished(stages: Stages) -> bool:
    """Has training been finished before?"""
    from llmkit.run import Run

    run = Run(stages.run)
    return bool(
        run.exists and run.checkpoints and run.checkpoints[-1].name == f"step_{run.config()['config']['steps']}"
    )


def samples(checkpoint_path: Path, prompts: Sequence[str], show: Callable[[str], None]) -> list[dict[str, Any]]:
    """A sampled continuation of each prompt, with a fixed seed."""
    from llmkit.checkpoint import Checkpoint
    from llmkit.engine import Sampling
    from llmkit.engines import open_engine
    from llmkit.generation import TextRequest, complete

    checkpoint = Checkpoint.open(checkpoint_path)
    tokenizer = checkpoint.tokenizer
    sampling = Sampling(max_tokens=48, temperature=0.8, top_k=50, seed=1)
    requests = [
        TextRequest(index, tuple(tokenizer.encode_prompt(prompt)), sampling) for index, prompt in enumerate(prompts)
    ]
    with open_engine(checkpoint) as engine:
        texts = {completion.id: completion.text for completion in complete(engine, tokenizer, requests)}
    for index, prompt in enumerate(prompts):
        show(prompt + texts[index])
    return [{"prompt": prompt, "text": texts[index]} for index, prompt in enumerate(prompts)]


def evaluate(checkpoint_path: Path) -> dict[str, Any]:
    """`bpb` on the first documents of the validation split, through the engine that users would get."""
    from llmkit.checkpoint import Checkpoint
    from llmkit.engines import open_engine
    from llmkit.evaluation import Evaluation

    checkpoint = Checkpoint.open(checkpoint_path)
    evaluation = Evaluation(checkpoint, ["bpb"], limit=EVAL_DOCUMENTS)
    with open_engine(checkpoint) as engine:
        for _ in evaluation.run(engine):
            pass
    return evaluation.results()
