"""GPT2Training: GPT-2 with AdamW, as llm.c trains it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.gpt2 import hf_weights
from llmkit.recipe import learning_rate_at, model_config
from llmkit.trainer import TrainJob
from llmkit.weights import Array
from llmkit_torch.loop import TrainingLoop
from llmkit_torch.model import GPT2, load_hf, to_hf
from llmkit_torch.processes import ALONE, Processes
from llmkit_torch.trainer import make_optimiser


class GPT2Training(TrainingLoop):
    """One run of the trainer `torch`."""

    model: GPT2

    def __init__(self, job: TrainJob, processes: Processes = ALONE) -> None:
        super().__init__(job, processes)
        self.forward: Any = torch.compile(self.model) if self.config.compile else self.model

    def make_model(self) -> GPT2:
        if self.job.start is not None:
            shape, weights = hf_weights(self.job.start)
            model = GPT2(shape)
            load_hf(model, weights)
        else:
            model = GPT2(model_config(self.config, self.job.data.vocab_size))
            model.initialise(self.config.seed)
        return model

    def blocks(self, model: GPT2) -> Iterable[nn.Module]:
        return model.transformer.h

    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        return [make_optimiser(self.model, self.config)]

    def set_rates(self) -> float:
        rate = learning_rate_at(self.step, self.config)
        for group in self.optimisers[0].param_groups:
            group["lr"] = rate
        return rate

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.forward(inputs, targets)
        return loss, loss

    def validation_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets)

    def sample(self) -> str:
        """Text from the end-of-text token on."""
        tokenizer = self.job.data.tokenizer
        end = tokenizer.eot_id
        with self.autocast:
            ids = self.model.generate(
                [0 if end is None else end], self.config.sample_tokens, temperature=1.0, seed=self.step, end=end
            )
        return tokenizer.decode(ids)

    def parameters_and_flops(self) -> tuple[int, int]:
        shape = self.model.config
        return shape.parameters, shape.flops_per_token(self.config.sequence_length)

    def to_hf(self) -> tuple[Mapping[str, Any], Mapping[str, Array]]:
        return self.model.config.to_hf(eot_id=self.job.data.eot_id), to_hf(self.model)
