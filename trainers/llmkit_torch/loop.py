"""TrainingLoop: what the PyTorch trainers have in common: the order of events, gradient accumulation, saving, resuming.

A trainer says what its model, optimisers, loss and schedules are.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.checkpoint import Checkpoint
from llmkit.files import write_json
from llmkit.trainer import Event, Finished, Sample, Started, Step, TrainJob, Validation, due
from llmkit.weights import Array
from llmkit_torch.hardware import describe, peak_flops, pick_device


class TrainingLoop(ABC):
    """One run: model, optimisers, data and where they stand.

    Attributes:
        step: optimiser steps that are done.
    """

    def __init__(self, job: TrainJob) -> None:
        self.job, self.config = job, job.config
        self.device = pick_device(self.config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")
        self.model = self.make_model().to(self.device)
        self.optimisers = self.make_optimisers()
        self.batches = job.batches()
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

    def micro_batches(self) -> int:
        """Micro-batches that this step accumulates."""
        c = self.config
        count: int = c.total_batch_tokens // (c.batch_size * c.sequence_length)
        return count

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
                yield Sample(self.step, self.sample())
            saved = self.step > first and due(self.step, c.checkpoint_every, c.steps)
            if saved:
                yield self._save(last_val)
            if self.step >= c.steps:
                break
            if self.job.stop.is_set():
                if self.step > first and not saved:
                    yield self._save(last_val)
                yield Finished(self.step, interrupted=True)
                return
            yield self.train_step()
        yield Finished(self.step)

    def train_step(self) -> Step:
        """Accumulate gradients, clip, update."""
        began = time.perf_counter()
        c, micro_batches = self.config, self.micro_batches()
        rate = self.set_rates()
        loss = self._accumulate(micro_batches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or float("inf"))
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        values = float(loss), float(norm)  # waits for the device, so that the time is the step's
        tokens = micro_batches * c.batch_size * c.sequence_length
        return Step(self.step - 1, values[0], rate, values[1], tokens, time.perf_counter() - began)

    def _accumulate(self, micro_batches: int) -> Tensor:
        """Leave the mean gradient over the micro-batches in the parameters; their mean loss in nats per token."""
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
        """Mean loss in nats per token over the job's validation batches."""
        self.model.eval()
        total = 0.0
        with torch.inference_mode(), self.autocast:
            for batch in self.job.validation:
                total += float(self.validation_loss(*self._to_device(batch)))
        return total / len(self.job.validation)

    def _to_device(self, batch: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)

    def _started(self) -> Started:
        parameters, flops = self.parameters_and_flops()
        dtype = torch.bfloat16 if self.config.dtype == "bf16" else torch.float32
        return Started(
            step=self.step,
            parameters=parameters,
            flops_per_token=flops,
            peak_flops=peak_flops(self.device, dtype),
            device=describe(self.device, self.config.dtype),
        )

    # --- saving and resuming

    def _save(self, val_loss: float | None) -> Event:
        config, weights = self.to_hf()
        return self.job.save(
            self.step, config=config, weights=weights, write_state=self._write_state, val_loss=val_loss
        )

    def _write_state(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"{name}/{key}": value.detach().cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            for key, value in self._optimiser_of(parameter).state[parameter].items()
        }
        save_file(tensors, folder / "optimizer.safetensors")
        write_json(folder / "state.json", {"step": self.step, "position": self.batches.position})

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Optimiser state, step and place in the data. ValueError where the state is damaged or foreign."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = checkpoint.trainer_state
        assert folder is not None
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            tensors = load_file(folder / "optimizer.safetensors")
            self.step, self.batches.position = int(state["step"]), int(state["position"])
            for name, parameter in self.model.named_parameters():
                optimiser = self._optimiser_of(parameter)
                optimiser.state[parameter] = {
                    key: self._stored(tensors, f"{name}/{key}", parameter) for key in state_keys(optimiser)
                }
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"the trainer state in {folder} is damaged or of another model: {error}") from None

    def _stored(self, tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        value = tensors[name]
        counter = name.endswith("/step")
        if not counter and value.shape[0] != parameter.shape[0] and value.shape != parameter.shape:
            raise ValueError(f"{name} has another shape")
        return value if counter and self.device.type == "cpu" else value.to(self.device)

    def _optimiser_of(self, parameter: Tensor) -> torch.optim.Optimizer:
        for optimiser in self.optimisers:
            if any(parameter is p for group in optimiser.param_groups for p in group["params"]):
                return optimiser
        raise AssertionError("a parameter that no optimiser holds")


def state_keys(optimiser: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimiser keeps for each parameter."""
    own: tuple[str, ...] | None = getattr(optimiser, "state_keys", None)
    return own or ("step", "exp_avg", "exp_avg_sq")
