"""SpeedrunTrainer: its options, as far as they depend on the machine. Importing this file does not import PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmkit.trainer import Event, Trainer, TrainJob
from llmkit_speedrun.config import RECORD_STREAM, SpeedrunTrainConfig, resolve

if TYPE_CHECKING:
    import torch

    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData

RECORD_GPU_BYTES = 70e9  # what a stream of RECORD_STREAM tokens needs, logits mostly
ROW_WITHOUT_FLEX = 1024  # where a dense mask has to do, streams are cut into rows of at least this length


class SpeedrunTrainer(Trainer):
    """The 5-minute architecture of the NanoGPT speedrun with Muon, on CPUs or GPUs."""

    name = "speedrun"
    requires = ("torch", "transformers")
    Config = SpeedrunTrainConfig
    resumable = frozenset({"nproc", "fsdp", "device", "threads"})
    torchrun = True

    @classmethod
    def resolve(cls, config: SpeedrunTrainConfig, data: TokenData, start: Checkpoint | None) -> SpeedrunTrainConfig:
        from llmkit_torch.hardware import has_fast_bf16, pick_device
        from llmkit_torch.trainer import process_count

        device = pick_device(config.device)
        if config.preset == "record-2024-11":
            config = dataclasses.replace(config, **_record_rows(config, device))
        config = resolve(config, data, start, processes=process_count(config))
        natural = "bf16" if has_fast_bf16(device) else "fp32"
        return dataclasses.replace(config, dtype=config.dtype or natural, ns_dtype=config.ns_dtype or natural)

    def train(self, job: TrainJob) -> Iterator[Event]:
        from llmkit_speedrun.training import SpeedrunTraining
        from llmkit_torch.launch import run

        return run(job, SpeedrunTraining)


def _record_rows(config: SpeedrunTrainConfig, device: torch.device) -> dict[str, Any]:
    """How the record's streams of 64K tokens fit the machine: its steps stay the same, by accumulation.

    One stream where FlexAttention and memory allow, shorter ones on smaller GPUs, rows of the window's length where the
    mask is dense.
    """
    import torch

    length = config.sequence_length
    if length is None and device.type == "cuda":
        length = RECORD_STREAM
        while length > 1024 and torch.cuda.get_device_properties(device).total_memory < (
            RECORD_GPU_BYTES * length / RECORD_STREAM
        ):
            length //= 2
    elif length is None:
        length = ROW_WITHOUT_FLEX
    return {"sequence_length": length, "batch_size": config.batch_size or (1 if device.type == "cuda" else 4)}
