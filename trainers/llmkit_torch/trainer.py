"""TorchTrainer: its options and its optimiser. Importing this file does not import PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.options import option
from llmkit.torchrun import Torchrun
from llmkit.trainer import Event, TrainConfig, Trainer, TrainJob

if TYPE_CHECKING:
    import torch

    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData
    from llmkit_torch.model import GPT2

BETAS = (0.9, 0.95)
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class TorchConfig(TrainConfig):
    """What `torch` adds to the shared options."""

    compile: bool = option(False, "Compile the model with torch.compile: slow to start, faster steps.")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps. [default: the best there is]")
    threads: int | None = option(
        None, "CPU threads of each process. [default: PyTorch's, shared by the processes]", minimum=1
    )
    nproc: int = option(1, "Processes on this machine, one for each GPU: data parallel, optimiser state shared out "
                           "(ZeRO-1).", minimum=1)  # fmt: skip
    fsdp: bool = option(False, "Share out the model too (FSDP2), for one that does not fit one device.")


class TorchTrainer(Trainer):
    """GPT-2 in plain PyTorch: the baseline, on CPUs or GPUs."""

    name = "torch"
    requires = ("torch",)
    Config = TorchConfig
    resumable = frozenset({"nproc", "fsdp", "device", "threads"})
    torchrun = True

    @classmethod
    def resolve(cls, config: TorchConfig, data: TokenData, start: Checkpoint | None) -> TorchConfig:
        from llmkit import recipe
        from llmkit_torch.hardware import has_fast_bf16, pick_device

        processes = process_count(config)
        resolved = recipe.resolve(config, data, start, processes=processes)
        device = pick_device(resolved.device)
        dtype = resolved.dtype or ("bf16" if has_fast_bf16(device) else "fp32")
        return dataclasses.replace(resolved, dtype=dtype)

    def train(self, job: TrainJob) -> Iterator[Event]:
        from llmkit_torch.launch import run
        from llmkit_torch.training import GPT2Training

        return run(job, GPT2Training)


def process_count(config: Any) -> int:
    """Processes of a new run. Raises ValueError where both torchrun and `--nproc` would start them, and for `--fsdp`
    of a single one.
    """
    started, nproc = Torchrun.from_environment(), config.nproc
    if started and nproc > 1:
        raise ValueError(f"--nproc {nproc} starts processes, and torchrun has started {started.world}: leave it out")
    count: int = started.world if started else nproc
    if config.fsdp and count == 1:
        raise ValueError("--fsdp shares the model out among several processes: add --nproc, or leave it out")
    return count


def make_optimiser(model: GPT2, config: TorchConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and embeddings, not on biases and norms. Fused: one pass over the memory."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate or 0.0, betas=BETAS, eps=EPSILON, fused=fused)
