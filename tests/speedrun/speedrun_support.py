"""What the tests of the speedrun share: small models with random weights, trainers on tiny data."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint import Checkpoint, save_checkpoint
from llmkit.data.tokens import TokenData, ValidationBatches
from llmkit.testing.tiny import tiny_data
from llmkit.tokenizer import load_tokenizer
from llmkit.trainer import TrainJob
from llmkit_speedrun import SpeedrunTrainer
from llmkit_speedrun.config import SpeedrunTrainConfig
from llmkit_speedrun.model import SpeedrunConfig, SpeedrunForCausalLM
from llmkit_speedrun.training import SpeedrunTraining

TINY: dict[str, Any] = {
    "depth": 3,
    "width": 32,
    "heads": 2,
    "sequence_length": 32,
    "batch_size": 4,
    "total_batch_tokens": 256,
    "steps": 6,
    "dtype": "fp32",
    "device": "cpu",
    "val_every": 3,
    "val_batches": 2,
    "sample_every": 0,
    "checkpoint_every": 3,
}


def random_model(*, seed: int = 0, **changes: Any) -> SpeedrunForCausalLM:
    """A small model in which nothing is zero or at its first value."""
    options = {
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 256,
        **changes,
    }
    model = SpeedrunForCausalLM(SpeedrunConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 1.0 if "embed" in name else 0.3 if p.dim() == 1 else 1.2 / p.shape[1] ** 0.5
            p.normal_(0.5 if p.dim() == 1 else 0.0, spread, generator=generator)
    return model


def save(model: SpeedrunForCausalLM, path: Path) -> Checkpoint:
    """As the trainer saves it, with the byte tokenizer."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}  # a tied head has no name of its own
    config = {**model.config.to_dict(), "architectures": ["SpeedrunForCausalLM"]}
    save_checkpoint(path, config=config, weights=weights, tokenizer=load_tokenizer("byte"), provenance={})
    return Checkpoint.open(path)


def resolved(path: Path, **changes: Any) -> tuple[SpeedrunTrainConfig, TokenData]:
    """Options for a tiny run, and its data."""
    data = TokenData(path / "data") if (path / "data").is_dir() else tiny_data(path / "data")
    config = SpeedrunTrainer.resolve(SpeedrunTrainConfig(**{**TINY, **changes}), data, None)
    return config, data


def training(path: Path, **changes: Any) -> SpeedrunTraining:
    """A run that can be stepped by hand; it cannot save."""
    config, data = resolved(path, **changes)
    assert config.batch_size and config.sequence_length
    validation = ValidationBatches(data, config.batch_size, config.sequence_length, batches=2)
    job = TrainJob(
        config=config,
        data=data,
        start=None,
        resume=False,
        save=None,  # type: ignore[arg-type]
        stop=threading.Event(),
        out=path,
        validation=validation,
    )
    return SpeedrunTraining(job)


def replace(config: SpeedrunTrainConfig, **changes: Any) -> SpeedrunTrainConfig:
    return dataclasses.replace(config, **changes)
