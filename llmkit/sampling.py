"""Sampling: the next token of every row of a batch of logits, as `llmkit.engine.Sampling` says.

For engines that have logits as PyTorch tensors. It imports torch, so engines import it inside functions.

A row's random numbers come from its own generator, one number a token, and the token is found by inverting the
cumulative distribution in the order of the ids. So a seed gives the same tokens alone and in any batch, unless the
rounding of the logits, which batches and devices change, moves the border between two tokens across that number.
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.engine import FinishReason, Sampling

HEAD = 1024  # top_p sorts this many of the likeliest tokens; only a distribution that is flatter is sorted whole


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, and what `Sampling.logprobs` asked for."""

    id: int
    logprob: float | None
    top_logprobs: Mapping[int, float] | None


class Sampler:
    """One request's state: its parameters, its random numbers and the tokens so far.

    `room` is how many tokens the model's context leaves for this request.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], *, eos_ids: frozenset[int], room: int) -> None:
        self.sampling = sampling
        self.limit = min(sampling.max_tokens, room)
        self.end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
        self.counts: Counter[int] = Counter()  # of generated tokens
        self.generated = 0
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._random = random.Random(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    def accept(self, token: int) -> FinishReason | None:
        """Take note of the chosen token; why the request is finished with it, if it is."""
        if token in self.end_ids:
            return "stop"
        self.counts[token] += 1
        self.generated += 1
        return "length" if self.generated >= self.limit else None

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return self._random.random()

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes anything at this step."""
        s = self.sampling
        penalised = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        return penalised or bool(s.logit_bias) or self.generated < s.min_tokens

    def adjust(self, logits: Tensor) -> None:
        """Apply penalties, bias and min_tokens to one row of logits, (V,) fp32, in place."""
        s = self.sampling
        if s.repetition_penalty != 1 and (seen := sorted(self._prompt | self.counts.keys())):
            ids = torch.tensor(seen, device=logits.device)
            picked = logits[ids]
            logits[ids] = torch.where(picked > 0, picked / s.repetition_penalty, picked * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and self.counts:
            ids = torch.tensor(list(self.counts), device=logits.device)
            times = torch.tensor(list(self.counts.values()), device=logits.device, dtype=logits.dtype)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * times
        if s.logit_bias:
            ids = torch.tensor(list(s.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(s.logit_bias.values()), device=logits.device, dtype=logits.dtype)
        if self.generated < s.min_tokens and self.end_ids:
            logits[torch.tensor(sorted(self.end_ids), device=logits.device)] = -torch.inf


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of each row of `logits`, (B, V), with its sampler. Draws one random number a row that samples."""
    model = logits.float()  # (B, V)
    changed = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    adjusted = model.clone() if changed else model
    for row in changed:
        samplers[row].adjust(adjusted[row])
    ids = adjusted.argmax(-1)  # (B,), the lowest id at a tie
    random_rows = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if random_rows:
        some = [samplers[row] for row in random_rows]
        probs = filtered_probs(adjusted[random_rows], [sampler.sampling for sampler in some])
        ids[random_rows] = draw(probs, [sampler.uniform() for sampler in some])
    return _with_logprobs(model, ids.tolist(), samplers)


def filtered_probs(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Weights, (B, V) and not normalised, after temperature (not 0), top_k, top_p and min_p of each row."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=logits.dtype).unsqueeze(1)  # (B, 1)

    vocab = logits.shape[1]
    logits = (logits - logits.amax(-1, keepdim=True)) / column([s.temperature for s in samplings])
    probs = logits.softmax(-1)
    if any(s.top_k for s in samplings):
        counts = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings], device=logits.device)
        kept = min(max(s.top_k for s in samplings), vocab)
        ranked = probs.topk(kept).values
        # A row without top_k keeps everything: its threshold lies below all probabilities.
        threshold = ranked.gather(1, (counts.clamp(max=kept) - 1).unsqueeze(1))
        threshold = threshold.masked_fill((counts == vocab).unsqueeze(1), -1.0)
        probs = _keep_largest(probs, threshold, counts)
        probs = probs / probs.sum(-1, keepdim=True)
    if any(s.top_p < 1 for s in samplings):
        top_p = column([s.top_p for s in samplings])
        ranked = probs.topk(min(HEAD, vocab)).values
        if bool((ranked.sum(-1, keepdim=True) < top_p).any()):
            ranked = probs.sort(descending=True).values
        # A token stays when those before it have less than top_p of the mass: the smallest set that reaches top_p.
        counts = (ranked.cumsum(-1) - ranked < top_p).sum(-1)
        threshold = ranked.gather(1, (counts - 1).unsqueeze(1))
        whole = (top_p >= 1).squeeze(1)
        probs = _keep_largest(probs, threshold.masked_fill(whole.unsqueeze(1), -1.0), counts.masked_fill(whole, vocab))
    if any(s.min_p for s in samplings):
        floor = probs.amax(-1, keepdim=True) * column([s.min_p for s in samplings])
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs


def _keep_largest(probs: Tensor, threshold: Tensor, counts: Tensor) -> Tensor:
    """Zero all but `counts` (B,) entries of each row; `threshold` (B, 1) the smallest kept. At a tie low ids stay."""
    above = probs > threshold
    tied = probs == threshold
    room = counts.unsqueeze(1) - above.sum(-1, keepdim=True)
    return torch.where(above | (tied & (tied.cumsum(-1) <= room)), probs, 0.0)


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """(B,) ids drawn from rows of weights, (B, V), by one number in [0, 1) for each row."""
    cumulative = weights.double().cumsum(-1) if weights.device.type != "mps" else weights.cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.tensor(uniforms, device=weights.device, dtype=cumulative.dtype).unsqueeze(1) * total
    # Rounding must not put the point at the very end, beyond the last token that has any weight.
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)


def _with_logprobs(model: Tensor, ids: Sequence[int], samplers: Sequence[Sampler]) -> list[Choice]:
    """The chosen ids with log-probabilities under the model, (B, V) logits, for the rows that ask for them."""
    choices = [Choice(token, None, None) for token in ids]
    asking = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    if not asking:
        return choices
    logprobs = model[asking].log_softmax(-1)
    for row, values in zip(asking, logprobs):
        best = values.topk(min(samplers[row].sampling.logprobs or 0, len(values)))
        top = dict(zip(best.indices.tolist(), best.values.tolist()))
        choices[row] = Choice(ids[row], float(values[ids[row]]), top)
    return choices
