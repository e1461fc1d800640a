"""Trainer: a training backend. It yields events; the core shows and records them, so all backends look the same.

`TrainConfig` holds the options that every backend shares. Fields left at None are filled in from the model's size and
the data by `llmkit.recipe.resolve`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llmkit.component import Component
from llmkit.options import option

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData, TrainBatches, ValidationBatches
    from llmkit.weights import Array

SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of every backend, under the names that `llmkit train` gives them."""

    size: str | None = option(None, "Named size: d6 … d48, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3:c768 …")
    depth: int | None = option(None, "Layers. Alone, it sets everything else. [default: 6]", minimum=1)
    width: int | None = option(None, "Channels. [default: GPT-2's for its depths, else 64 per layer]", minimum=1)
    heads: int | None = option(None, "Attention heads. [default: one per 64 channels]", minimum=1)
    sequence_length: int | None = option(None, "Tokens in a sequence. [default: 256 to 1024, by depth]", minimum=1)
    batch_size: int | None = option(None, "Sequences in a micro-batch. [default: 4096 tokens' worth]", minimum=1)
    total_batch_tokens: int | None = option(
        None,
        "Tokens in an optimiser step, reached by accumulating micro-batches. [default: by size and data]",
        minimum=1,
    )
    steps: int | None = option(
        None, "Optimiser steps. [default: 20 tokens per parameter, but at most 4 passes over the data]", minimum=1
    )
    learning_rate: float | None = option(None, "Peak learning rate. [default: by size]", minimum=0)
    schedule: str = option("cosine", "Learning rate after the warm-up.", choices=SCHEDULES)
    warmup_steps: int | None = option(None, "Steps of linear warm-up. [default: 5%, at most 700]", minimum=0)
    final_lr_fraction: float = option(0.1, "Final learning rate, as a fraction of the peak.", minimum=0, maximum=1)
    weight_decay: float = option(0.1, "Decay of matrices and embeddings.", minimum=0)
    grad_clip: float = option(1.0, "Largest gradient norm; 0 does not clip.", minimum=0)
    dtype: str | None = option(
        None, "Arithmetic. [default: bf16 where the hardware computes it, else fp32]", choices=("fp32", "bf16")
    )
    seed: int = option(42, "Seed of initialisation and data order.", minimum=0, maximum=2**32 - 1)
    val_every: int | None = option(
        None, "Validate every N steps, and at the end; 0 only at the end. [default: a tenth of the run, at most 250]",
        minimum=0,
    )  # fmt: skip
    val_batches: int = option(20, "Micro-batches in a validation; -1 takes the whole split.", minimum=-1)
    sample_every: int | None = option(
        None, "Show generated text every N steps, and at the end; 0 never. [default: a fifth of the run]", minimum=0
    )
    sample_tokens: int = option(64, "Tokens in a sample.", minimum=1)
    checkpoint_every: int | None = option(
        None, "Save every N steps, and at the end; 0 only at the end. [default: a tenth of the run, at most 1000]",
        minimum=0,
    )  # fmt: skip
    keep_last: int = option(3, "Checkpoints kept; 0 keeps all.", minimum=0)
    keep_every: int = option(0, "Keep the checkpoints of multiples of N steps besides; 0 none.", minimum=0)
    from_checkpoint: str | None = option(
        None, "Begin with the weights of this checkpoint: a directory, run, llm.c .bin or hub id.", flag="--from",
        metavar="CHECKPOINT",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Started:
    """Training is about to begin. `step` steps are done already; `flops_per_token` counts forward and backward.

    `peak_flops` is what the hardware could do per second in this dtype, measured or from its data sheet; None where
    unknown. `device` is for people.
    """

    step: int
    parameters: int
    flops_per_token: int
    peak_flops: float | None
    device: str


@dataclass(frozen=True, slots=True)
class Step:
    """Optimiser step number `step`, counted from 0, is done. Yielded before anything is saved that it changed.

    `loss` is the mean over its tokens in nats, `grad_norm` before clipping, `seconds` from the end of the step before
    (validation, samples and saving not counted). `skipped`: the update was left out as an outlier.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean loss over `job.validation` in nats per token, after `step` steps."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A task scored during training, after `step` steps: `value` of `metric` over `n` documents."""

    step: int
    task: str
    metric: str
    value: float
    n: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Generated text, after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete, after `step` steps."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a user should know, in one sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. `interrupted`: `job.stop` was set; the state is saved."""

    step: int
    interrupted: bool = False


Event = Started | Step | Validation | Evaluation | Sample | Saved | Note | Finished


class Save(Protocol):
    """Saves a checkpoint of the run, whole or not at all, and removes those beyond `keep_last` and `keep_every`."""

    def __call__(
        self,
        step: int,
        *,
        config: Mapping[str, Any],
        weights: Mapping[str, Array],
        write_state: Callable[[Path], None],
        val_loss: float | None,
    ) -> Saved:
        """`config` is config.json and `weights` fp32 arrays under Hugging Face's names.

        `write_state` puts what resuming needs into the folder that it is given. Raises OSError where it cannot be
        written; the checkpoints before it are untouched.
        """


@dataclass(frozen=True)
class TrainJob:
    """One training run, all options filled in.

    Attributes:
        config: an instance of the trainer's own `Config`, with no None among the shared options but `size` and `from`.
        data: the opened data folder.
        start: checkpoint to begin with, or None for a new model. Its `step` counts only when resuming.
        resume: go on from `start` exactly where it was saved: optimiser, data order and all.
        save: how to save a checkpoint.
        stop: set when the user wants to stop: save after the current step and finish.
        out: the run directory, for further files of the backend.
    """

    config: Any
    data: TokenData
    start: Checkpoint | None
    resume: bool
    save: Save
    stop: threading.Event
    out: Path
    validation: ValidationBatches

    def batches(self, *, rank: int = 0, world: int = 1) -> TrainBatches:
        """The training batches from the beginning; set `position` to go on elsewhere."""
        from llmkit.data.tokens import TrainBatches

        c = self.config
        shards = self.data.shards("train")
        return TrainBatches(shards, c.batch_size, c.sequence_length, seed=c.seed, rank=rank, world=world)


class Trainer(Component, ABC):
    """A training backend.

    `Config` is a frozen dataclass derived from TrainConfig; its fields become flags of `llmkit train`. Those named by
    `resumable` may change when a run is resumed. `torchrun`: it can be one of several processes that torchrun started.
    Then all of them train, and the core shows and records the events of process 0 only, which saves.
    """

    Config: ClassVar[type[TrainConfig]] = TrainConfig
    resumable: ClassVar[frozenset[str]] = frozenset()
    torchrun: ClassVar[bool] = False

    @classmethod
    def resolve(cls, config: Any, data: TokenData, start: Checkpoint | None) -> Any:
        """The configuration with every None filled in. Raises ValueError, naming the flag, where it cannot work.

        By default GPT-2's rules. `start` is the checkpoint of `--from`.
        """
        from llmkit.recipe import resolve

        return resolve(config, data, start)

    @abstractmethod
    def train(self, job: TrainJob) -> Iterator[Event]:
        """Train, yielding events: Started first, Finished last, a Step for every optimiser step in order.

        Validates every `val_every` steps (at step 0 too, unless resuming) and at the end, samples and saves likewise.
        Raises ValueError where the configuration cannot work. It prints nothing.
        """


def due(step: int, every: int, steps: int) -> bool:
    """Is something that happens every `every` steps, and at the end, due after `step` steps?"""
    return step == steps or (every > 0 and step % every == 0)
