"""SpeedrunTraining: the 5-minute architecture with Muon for matrices and Adam for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from llmkit.trainer import TrainJob
from llmkit.weights import Array
from llmkit_speedrun.attention_mask import block_mask, dense_mask, document_ids
from llmkit_speedrun.config import (
    micro_batches_at,
    model_options,
    momentum_at,
    rate_factor_at,
    token_weights_at,
    window_at,
)
from llmkit_speedrun.model import SpeedrunConfig, SpeedrunForCausalLM
from llmkit_speedrun.muon import JORDAN, POLAR_EXPRESS, Muon
from llmkit_torch.loop import TrainingLoop
from llmkit_torch.processes import ALONE, Processes
from llmkit_torch.update import whole

BETAS = (0.9, 0.95)
EPSILON = 1e-10
IGNORED = -100  # a target that counts for nothing


class SpeedrunTraining(TrainingLoop):
    """One run of the trainer `speedrun`."""

    model: SpeedrunForCausalLM

    def __init__(self, job: TrainJob, processes: Processes = ALONE) -> None:
        super().__init__(job, processes)
        self.document_mask = "document-mask" not in self.config.switched_off
        self.forward: Any = torch.compile(self.model) if self.config.compile else self.model

    def make_model(self) -> SpeedrunForCausalLM:
        c, job = self.config, self.job
        options = model_options(c, job.data.vocab_size, job.data.eot_id)
        self.flex = self.device.type == "cuda"
        attention = "flex_attention" if self.flex else "sdpa"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            model = SpeedrunForCausalLM(SpeedrunConfig(**options, attn_implementation=attention))
        if job.start is not None:
            model.load_state_dict(
                {name: torch.from_numpy(np.array(array)) for name, array in job.start.weights.items()},
                strict=not model.config.tie_word_embeddings,
            )
        return model

    def blocks(self, model: SpeedrunForCausalLM) -> Iterable[nn.Module]:
        return model.model.layers

    def make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        c, model = self.config, self.model
        embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        head = [] if model.config.tie_word_embeddings else [model.lm_head.weight]
        taken = {id(p) for p in (*embeddings, *head)}
        rest = [p for p in model.parameters() if id(p) not in taken]
        # A gate of value embeddings has a row for each head: too few to orthogonalise.
        gates = {id(p) for name, p in model.named_parameters() if "value_gate" in name}
        matrices = [p for p in rest if p.dim() == 2 and id(p) not in gates]
        scalars = [p for p in rest if p.dim() != 2 or id(p) in gates]
        # The record ties nothing; where the embedding is the head too, the head's rate is the one that is stable.
        embedding_rate = c.head_learning_rate if model.config.tie_word_embeddings else c.embedding_learning_rate
        groups = [(embeddings, embedding_rate), (head, c.head_learning_rate), (scalars, c.scalar_learning_rate)]
        fused = self.device.type in ("cpu", "cuda")
        optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(
                [{"params": params, "lr": rate} for params, rate in groups if params],
                betas=BETAS,
                eps=EPSILON,
                fused=fused,
            )
        ]
        if c.optimizer == "muon":
            optimisers.append(
                Muon(
                    matrices,
                    c.learning_rate,
                    momentum=c.momentum,
                    weight_decay=c.weight_decay,
                    cautious=c.cautious_weight_decay,
                    normuon=c.normuon,
                    coefficients=POLAR_EXPRESS if c.polar_express else JORDAN,
                    dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[c.ns_dtype],
                )
            )
        else:
            optimisers.append(
                torch.optim.AdamW(
                    matrices, c.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=c.weight_decay, fused=fused
                )
            )
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["peak_lr"] = group["lr"]
        return optimisers

    # --- schedules

    def set_rates(self) -> float:
        factor = rate_factor_at(self.step, self.config)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = factor * group["peak_lr"]
                if isinstance(optimiser, Muon):
                    group["momentum"] = momentum_at(self.step, self.config)
        return factor * self.config.learning_rate

    @classmethod
    def micro_batches_at(cls, step: int, config: Any) -> int:
        return micro_batches_at(step, config)

    # --- the loss

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        documents = self._documents(inputs)
        logits = self._logits(inputs, documents, window_at(self.step, self.config))
        losses = []
        for ahead, weight in enumerate(token_weights_at(self.step, self.config)):
            losses.append(weight * _cross_entropy(logits, _further_targets(targets, documents, ahead)))
        return torch.stack(losses).sum(), losses[0]

    def validation_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        window = window_at(self.config.steps, self.config)
        return _cross_entropy(self._logits(inputs, self._documents(inputs), window), targets)

    def _documents(self, inputs: Tensor) -> Tensor:
        return document_ids(inputs, self.job.data.eot_id if self.document_mask else None)

    def _logits(self, inputs: Tensor, documents: Tensor, window: int) -> Tensor:
        """(B, T, V) in fp32."""
        mask = block_mask(documents, window) if self.flex else dense_mask(documents, window)
        logits: Tensor = self.forward(inputs, attention_mask=mask, use_cache=False).logits
        return logits

    # --- what the loop wants to know

    def sample(self) -> str:
        """Text from the end-of-text token on."""
        data, config = self.job.data, self.model.config
        generator = torch.Generator(device=self.device).manual_seed(self.step)
        ids = [0 if data.eot_id is None else data.eot_id]
        given = torch.tensor([ids], device=self.device)
        cache = DynamicCache(config=config)
        attention, config._attn_implementation = config._attn_implementation, "sdpa"
        # no_grad: see `validate`
        with torch.no_grad(), self.autocast:
            for _ in range(min(self.config.sample_tokens, self.config.sequence_length)):
                logits = self.model(given, past_key_values=cache, use_cache=True).logits[0, -1]
                given = torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]
                if int(given) == data.eot_id:
                    break
                ids.append(int(given))
        config._attn_implementation = attention
        return data.tokenizer.decode(ids[1:])

    def parameters_and_flops(self) -> tuple[int, int]:
        """FLOPs as llm.c counts them: 6 for each parameter that multiplies, 6·L·C for each token attended to."""
        c, model = self.config, self.model
        parameters = sum(p.numel() for p in model.parameters())
        looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
        multiplied = parameters - (0 if model.config.tie_word_embeddings else looked_up)
        attended = min(c.window or c.sequence_length, c.sequence_length)
        return parameters, 6 * multiplied + 6 * c.depth * c.width * attended

    def to_hf(self) -> tuple[Mapping[str, Any], Mapping[str, Array]]:
        config = self.model.config.to_dict()
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        weights = {
            name: whole(tensor).float().cpu().numpy()
            for name, tensor in self.model.state_dict().items()
            if name not in tied
        }
        return {**config, "architectures": ["SpeedrunForCausalLM"]}, weights


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _further_targets(targets: Tensor, documents: Tensor, ahead: int) -> Tensor:
    """The targets `ahead` tokens after the next one, ignored where they belong to another document.

    The end-of-text token that closes a document is its last target, though it opens the next one.
    """
    if ahead == 0:
        return targets
    further = torch.full_like(targets, IGNORED)
    same = documents[:, ahead:] == documents[:, :-ahead]
    further[:, :-ahead] = torch.where(same, targets[:, ahead:], IGNORED)
    return further
