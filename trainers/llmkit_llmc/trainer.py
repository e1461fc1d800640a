"""LlmcTrainer: the backend's options and checks. The loop is in `loop`, several processes are in `processes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.options import option
from llmkit.trainer import Event, TrainConfig, Trainer, TrainJob

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class LlmcConfig(TrainConfig):
    """What `llmc` adds to the shared options."""

    threads: int | None = option(
        None, "CPU threads of each process. [default: all, shared by the processes]", minimum=1
    )
    nproc: int = option(1, "Processes, over MPI: data parallel, optimiser state shared out (ZeRO-1).", minimum=1)
    recompute: int = option(2, "In the backward: 0 nothing, 1 GELU, 2 GELU and LayerNorm.", minimum=0, maximum=2)
    master_weights: bool = option(True, "With bf16: keep fp32 weights for the optimiser.")
    skip_loss: float = option(
        0.0, "Skip an update whose loss is this many deviations above the last 128; 0 never.", minimum=0
    )
    skip_norm: float = option(0.0, "The same for the gradient norm.", minimum=0)
    overfit: bool = option(False, "Train on the first step's batch only: a check that the model can learn it.")
    hellaswag: str | None = option(
        None, "Evaluate HellaSwag with each validation, from this .jsonl or eval .bin.", metavar="FILE"
    )
    prompt: str = option("", "Text that samples begin with. [default: end of text]")
    temperature: float = option(1.0, "Of samples; 0 takes the likeliest token.", minimum=0)
    top_k: int = option(0, "Sample among the K likeliest tokens; 0 all.", minimum=0)


class LlmcTrainer(Trainer):
    """GPT-2 in C, compiled for this machine: faster than PyTorch on a CPU, and without it."""

    name = "llmc"
    Config = LlmcConfig

    @classmethod
    def unavailable(cls) -> str | None:
        from llmkit_llmc.build import BuildError, find_compiler

        try:
            find_compiler()
        except BuildError as error:
            return f"needs a C compiler: {error}"
        return super().unavailable()

    @classmethod
    def resolve(cls, config: LlmcConfig, data: TokenData, start: Checkpoint | None) -> LlmcConfig:
        resolved: LlmcConfig = super().resolve(config, data, start)
        assert resolved.batch_size and resolved.sequence_length and resolved.total_batch_tokens
        if resolved.nproc > 1:
            step = resolved.batch_size * resolved.sequence_length * resolved.nproc
            if resolved.total_batch_tokens % step:
                raise ValueError(
                    f"--total-batch-tokens {resolved.total_batch_tokens} does not divide into {resolved.nproc} "
                    f"processes with micro-batches of {resolved.batch_size} sequences of {resolved.sequence_length} "
                    f"tokens: use a multiple of {step}"
                )
        if resolved.dtype is None:
            from llmkit_llmc.library import load

            resolved = dataclasses.replace(resolved, dtype=load().default_dtype)
        return resolved

    def train(self, job: TrainJob) -> Iterator[Event]:
        if job.config.nproc > 1:
            from llmkit_llmc.processes import train

            return train(job)
        from llmkit_llmc.loop import Training

        return Training(job).run()
