"""TrainingLoop: what the PyTorch trainers have in common: the order of events, gradient accumulation, saving, resuming.

A trainer says what its model, optimisers, loss and schedules are.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.checkpoint import Checkpoint
from llmkit.files import write_json
from llmkit.trainer import Event, Finished, Sample, Saved, Started, Step, TrainJob, Validation, due
from llmkit.weights import Array
from llmkit_torch.hardware import describe, peak_flops
from llmkit_torch.processes import ALONE, Processes, own_device
from llmkit_torch.update import ShardedUpdate, Update


class TrainingLoop(ABC):
    """One run: model, optimisers, data and where they stand.

    Where several processes train together, each runs this loop: every step shares out the same batch, and what the
    others have to know goes through `processes`. Events and checkpoints of process 0 are those of the run.

    Attributes:
        step: optimiser steps that are done.
        fully_sharded: FSDP has shared out the model, so that all processes must take part in every forward pass.
    """

    def __init__(self, job: TrainJob, processes: Processes = ALONE) -> None:
        self.job, self.config, self.processes = job, job.config, processes
        self.device = own_device(self.config.device, processes)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")
        self.fully_sharded: bool = self.config.fsdp
        self.model = self._place(self.make_model())
        self.optimisers = self.make_optimisers()
        self.update = (
            Update(self.model, self.optimisers)
            if processes.count == 1 or self.fully_sharded
            else ShardedUpdate(self.model, self.optimisers, processes)
        )
        self.batches = job.batches(rank=processes.rank, world=processes.count)
        self.step = 0
        if job.resume and job.start is not None:
            self._restore(job.start)

    # --- what a trainer says

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A new model, or that of `job.start`, on the CPU."""

    @abstractmethod
    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        """Optimisers that together hold every parameter of the model once."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What a micro-batch (B, T) is to minimise, and its mean loss in nats per token, which is what is shown."""

    @abstractmethod
    def set_rates(self) -> float:
        """Set the optimisers' learning rates (and whatever else has a schedule) for this step; the rate to show."""

    @abstractmethod
    def validation_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token."""

    @abstractmethod
    def sample(self) -> str:
        """Generated text; the seed follows the step, so that a resumed run shows the same."""

    @abstractmethod
    def parameters_and_flops(self) -> tuple[int, int]:
        """Parameters, and FLOPs of forward and backward for a token."""

    @abstractmethod
    def to_hf(self) -> tuple[Mapping[str, Any], Mapping[str, Array]]:
        """config.json, and fp32 weights under Hugging Face's names."""

    @abstractmethod
    def blocks(self, model: Any) -> Iterable[nn.Module]:
        """The parts of the model that run one after another; `--fsdp` gathers one of them at a time."""

    @classmethod
    def micro_batches_at(cls, step: int, config: Any) -> int:
        """Micro-batches that step number `step` accumulates, all processes together."""
        count: int = config.total_batch_tokens // (config.batch_size * config.sequence_length)
        return count

    def _place(self, model: nn.Module) -> Any:
        """On the device; with `--fsdp` every process keeps its share of each block, and gathers a block to run it."""
        if not self.fully_sharded:
            return model.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.processes.count,))
        # The speedrun's blocks return values for the blocks after them, which nobody changes.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for block in self.blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    # --- the loop

    def run(self) -> Iterator[Event]:
        c, first, last_val = self.config, self.step, None
        yield self._started()
        while True:
            if due(self.step, c.val_every, c.steps) and (self.step > first or not self.job.resume):
                last_val = self.validate()
                yield Validation(self.step, last_val)
            if self.step > first and c.sample_every and due(self.step, c.sample_every, c.steps):
                self.model.eval()
                text = self.sample() if self.processes.rank == 0 or self.fully_sharded else ""
                yield Sample(self.step, text)
            saved = self.step > first and due(self.step, c.checkpoint_every, c.steps)
            if saved:
                yield self._save(last_val)
            if self.step >= c.steps:
                break
            if self.processes.any(self.job.stop.is_set()):
                if self.step > first and not saved:
                    yield self._save(last_val)
                yield Finished(self.step, interrupted=True)
                return
            yield self.train_step()
        yield Finished(self.step)

    def train_step(self) -> Step:
        """Accumulate gradients, clip, update."""
        began = time.perf_counter()
        c, micro_batches = self.config, self.micro_batches_at(self.step, self.config)
        rate = self.set_rates()
        loss = self.processes.mean(self._accumulate(micro_batches // self.processes.count))
        norm = self.update.step(c.grad_clip)
        self.step += 1
        values = float(loss), float(norm)  # waits for the device, so that the time is the step's
        tokens = micro_batches * c.batch_size * c.sequence_length
        return Step(self.step - 1, values[0], rate, values[1], tokens, time.perf_counter() - began)

    def _accumulate(self, micro_batches: int) -> Tensor:
        """Leave the mean gradient over so many micro-batches in the parameters; their mean loss in nats per token."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for _ in range(micro_batches):
            inputs, targets = self._to_device(next(self.batches))
            with self.autocast:
                objective, loss = self.loss(inputs, targets)
            torch.autograd.backward(objective / micro_batches)
            total += loss.detach() / micro_batches
        return total

    def validate(self) -> float:
        """Mean loss in nats per token over the job's validation batches; the processes take turns at them."""
        self.model.eval()
        rank, count, batches = self.processes.rank, self.processes.count, len(self.job.validation)
        total, last = 0.0, batches - 1
        # FSDP keeps what it gathers into, and could not train with what was made in inference mode.
        with torch.no_grad() if self.fully_sharded else torch.inference_mode(), self.autocast:
            for index, batch in enumerate(self.job.validation):
                # Where all must run the model together, those without a batch in the last round join with its last one.
                joins = self.fully_sharded and index == last and rank > last % count
                if index % count == rank or joins:
                    loss = float(self.validation_loss(*self._to_device(batch)))
                    total += 0.0 if joins else loss
        return float(self.processes.sum(torch.tensor(total, dtype=torch.float64))) / batches

    def _to_device(self, batch: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)

    def _started(self) -> Started:
        parameters, flops = self.parameters_and_flops()
        dtype = torch.bfloat16 if self.config.dtype == "bf16" else torch.float32
        peak, device, count = (
            peak_flops(self.device, dtype),
            describe(self.device, self.config.dtype),
            self.processes.count,
        )
        return Started(
            step=self.step,
            parameters=parameters,
            flops_per_token=flops,
            peak_flops=peak and peak * count,
            device=f"{count} x {device}" if count > 1 else device,
        )

    # --- saving and resuming

    def _save(self, val_loss: float | None) -> Event:
        config, weights = self.to_hf() if self.processes.rank == 0 or self.fully_sharded else ({}, {})
        state = self.update.state()
        if self.processes.rank:
            return Saved(self.step, self.job.out)  # process 0 knows where
        write_state = functools.partial(self._write_state, state=state)
        return self.job.save(self.step, config=config, weights=weights, write_state=write_state, val_loss=val_loss)

    def _write_state(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        from safetensors.torch import save_file

        save_file(dict(self.update.state() if state is None else state), folder / "optimizer.safetensors")
        write_json(folder / "state.json", {"step": self.step, "position": self.batches.position})

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Optimiser state, step and place in the data. ValueError where the state is damaged or foreign."""
        from safetensors import SafetensorError

        folder = checkpoint.trainer_state
        assert folder is not None
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            self.update.load(folder / "optimizer.safetensors")
            self.step, self.batches.position = int(state["step"]), int(state["position"])
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"the trainer state in {folder} is damaged or of another model: {error}") from None
