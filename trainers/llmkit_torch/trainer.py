"""TorchTrainer: the training loop. Importing this file does not import PyTorch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.options import option
from llmkit.trainer import Event, Finished, Sample, Started, Step, TrainConfig, Trainer, TrainJob, Validation, due

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
    threads: int | None = option(None, "CPU threads. [default: PyTorch's]", minimum=1)


class TorchTrainer(Trainer):
    """GPT-2 in plain PyTorch: the baseline, on a CPU or one GPU."""

    name = "torch"
    requires = ("torch",)
    Config = TorchConfig

    @classmethod
    def resolve(cls, config: TorchConfig, data: TokenData, start: Checkpoint | None) -> TorchConfig:
        from llmkit_torch.hardware import has_fast_bf16, pick_device

        resolved: TorchConfig = super().resolve(config, data, start)
        device = pick_device(resolved.device)
        dtype = resolved.dtype or ("bf16" if has_fast_bf16(device) else "fp32")
        return dataclasses.replace(resolved, dtype=dtype)

    def train(self, job: TrainJob) -> Iterator[Event]:
        import torch

        if job.config.threads:
            torch.set_num_threads(job.config.threads)
        return _Training(job).run()


class _Training:
    """One run: model, optimiser, data and where they stand."""

    def __init__(self, job: TrainJob) -> None:
        import torch

        from llmkit.gpt2 import hf_weights
        from llmkit.recipe import model_config
        from llmkit_torch.hardware import pick_device
        from llmkit_torch.model import GPT2, load_hf

        self.job, self.config = job, job.config
        self.device = pick_device(self.config.device)
        if job.start is not None:
            shape, weights = hf_weights(job.start)
            self.model = GPT2(shape)
            load_hf(self.model, weights)
        else:
            self.model = GPT2(model_config(self.config, job.data.vocab_size))
            self.model.initialise(self.config.seed)
        self.model.to(self.device)
        self.forward: Any = torch.compile(self.model) if self.config.compile else self.model
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")
        self.optimiser = make_optimiser(self.model, self.config)
        self.batches = job.batches()
        micro_batch_tokens = self.config.batch_size * self.config.sequence_length
        self.micro_batches: int = self.config.total_batch_tokens // micro_batch_tokens
        self.step = 0
        if job.resume and job.start is not None:
            self._restore(job.start)

    def run(self) -> Iterator[Event]:
        c, first, last_val = self.config, self.step, None
        yield self._started()
        while True:
            if due(self.step, c.val_every, c.steps) and (self.step > first or not self.job.resume):
                last_val = self.validate()
                yield Validation(self.step, last_val)
            if self.step > first and c.sample_every and due(self.step, c.sample_every, c.steps):
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
        """Forward and backward over the micro-batches, clip, update."""
        import torch

        from llmkit.recipe import learning_rate_at

        began = time.perf_counter()
        c = self.config
        self.model.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.micro_batches):
            inputs, targets = self._next()
            with self.autocast:
                loss = self.forward(inputs, targets) / self.micro_batches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or float("inf"))
        rate = learning_rate_at(self.step, c)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        values = float(total), float(norm)  # waits for the device, so that the time is the step's
        seconds = time.perf_counter() - began
        return Step(self.step - 1, values[0], rate, values[1], c.total_batch_tokens, seconds)

    def _next(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        inputs, targets = next(self.batches)
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)

    def validate(self) -> float:
        """Mean loss in nats per token over the job's validation batches."""
        import torch

        self.model.eval()
        total = 0.0
        with torch.inference_mode(), self.autocast:
            for inputs, targets in self.job.validation:
                x, y = torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)
                total += float(self.model(x, y))
        return total / len(self.job.validation)

    def sample(self) -> str:
        """Text from the end-of-text token on; the seed follows the step, so that a resumed run shows the same."""
        self.model.eval()
        tokenizer = self.job.data.tokenizer
        end = tokenizer.eot_id
        with self.autocast:
            ids = self.model.generate(
                [0 if end is None else end], self.config.sample_tokens, temperature=1.0, seed=self.step, end=end
            )
        return tokenizer.decode(ids)

    def _started(self) -> Started:
        import torch

        from llmkit_torch.hardware import describe, peak_flops

        shape = self.model.config
        dtype = torch.bfloat16 if self.config.dtype == "bf16" else torch.float32
        return Started(
            step=self.step,
            parameters=shape.parameters,
            flops_per_token=shape.flops_per_token(self.config.sequence_length),
            peak_flops=peak_flops(self.device, dtype),
            device=describe(self.device, self.config.dtype),
        )

    def _save(self, val_loss: float | None) -> Event:
        from pathlib import Path

        from llmkit.files import write_json
        from llmkit_torch.model import to_hf

        def write_state(folder: Path) -> None:
            from safetensors.torch import save_file

            tensors = {
                f"{name}/{key}": value.detach().cpu().contiguous()
                for name, parameter in self.model.named_parameters()
                for key, value in self.optimiser.state[parameter].items()
            }
            save_file(tensors, folder / "optimizer.safetensors")
            write_json(folder / "state.json", {"step": self.step, "position": self.batches.position})

        eot = self.job.data.eot_id
        config = self.model.config.to_hf(eot_id=eot)
        return self.job.save(
            self.step, config=config, weights=to_hf(self.model), write_state=write_state, val_loss=val_loss
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Optimiser state, step and place in the data. ValueError where the state is damaged or foreign."""
        import json

        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = checkpoint.trainer_state
        assert folder is not None
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            tensors = load_file(folder / "optimizer.safetensors")
            self.step, self.batches.position = int(state["step"]), int(state["position"])
            for name, parameter in self.model.named_parameters():
                moments = {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                if moments["exp_avg"].shape != parameter.shape or moments["exp_avg_sq"].shape != parameter.shape:
                    raise ValueError(f"{name} has another shape")
                self.optimiser.state[parameter] = {
                    key: value if key == "step" and self.device.type == "cpu" else value.to(self.device)
                    for key, value in moments.items()
                }
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"the trainer state in {folder} is damaged or of another model: {error}") from None


def make_optimiser(model: GPT2, config: TorchConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and embeddings, not on biases and norms. Fused: one pass over the memory."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate or 0.0, betas=BETAS, eps=EPSILON, fused=fused)
