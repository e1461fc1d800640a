"""Sampler: one request's parameters, random numbers and tokens so far; and the choice of the next tokens of a step.

The same rules as `llmkit.sampling`, without PyTorch: a seed gives the same random numbers, one a token, alone or in
company.
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmkit.engine import FinishReason, GenerateRequest
from llmkit_engine.library import Draw
from llmkit_engine.runner import Runner

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, and what `Sampling.logprobs` asked for."""

    id: int
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None


class Sampler:
    """One request's state. `room` is how many tokens the model's context leaves for it."""

    def __init__(self, request: GenerateRequest, *, eos_ids: frozenset[int], room: int) -> None:
        sampling = request.sampling
        self.sampling = sampling
        self.limit = min(sampling.max_tokens, room)
        self.end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
        self.counts: Counter[int] = Counter()  # of generated tokens
        self.tokens: list[int] = []
        self._constraint = request.constraint
        self._prompt = frozenset(request.prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._random = random.Random(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    def accept(self, token: int) -> FinishReason | None:
        """Take note of the chosen token; why the request is finished with it, if it is."""
        if token in self.end_ids:
            return "stop"
        self.counts[token] += 1
        self.tokens.append(token)
        return "length" if len(self.tokens) >= self.limit else None

    def draw(self) -> Draw:
        """What the compiled sampler needs; takes the next random number."""
        s = self.sampling
        return Draw(self._random.random(), s.temperature, s.top_p, s.min_p, s.top_k)

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes anything at this step."""
        s = self.sampling
        penalised = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        return penalised or bool(s.logit_bias) or len(self.tokens) < s.min_tokens or self._constraint is not None

    def adjust(self, logits: Floats) -> None:
        """Apply penalties, bias, min_tokens and the constraint to one row of logits, (V,), in place.

        Raises ValueError where the constraint allows nothing or its mask has another size.
        """
        s = self.sampling
        if s.repetition_penalty != 1 and (seen := sorted(self._prompt | self.counts.keys())):
            picked = logits[seen]
            penalty = np.float32(s.repetition_penalty)
            logits[seen] = np.where(picked > 0, picked / penalty, picked * penalty)
        if (s.presence_penalty or s.frequency_penalty) and self.counts:
            times = np.array(list(self.counts.values()), dtype=np.float32)
            logits[list(self.counts)] -= np.float32(s.presence_penalty) + np.float32(s.frequency_penalty) * times
        if s.logit_bias:
            logits[list(s.logit_bias)] += np.array(list(s.logit_bias.values()), dtype=np.float32)
        if len(self.tokens) < s.min_tokens and self.end_ids:
            logits[sorted(self.end_ids)] = -np.inf
        if self._constraint is not None:
            allowed = np.asarray(self._constraint(tuple(self.tokens)), dtype=bool)
            if allowed.shape != logits.shape:
                raise ValueError(f"constraint gave a mask of shape {list(allowed.shape)}, not {list(logits.shape)}")
            if not np.isfinite(logits[allowed]).any():
                raise ValueError("constraint allows no token")
            logits[~allowed] = -np.inf


def choose(runner: Runner, logits: Floats, samplers: Sequence[Sampler]) -> list[Choice | ValueError]:
    """The next token of each row of `logits`, (R, V), with its sampler; the error of one whose constraint fails.

    Changes `logits` in place.
    """
    asking = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    before = {row: logits[row].copy() for row in asking if samplers[row].adjusts}
    errors: dict[int, ValueError] = {}
    for row, sampler in enumerate(samplers):
        if sampler.adjusts:
            try:
                sampler.adjust(logits[row])
            except ValueError as error:
                errors[row] = error
    random_rows = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    ids = runner.argmax(logits) if len(random_rows) < len(samplers) else np.empty(len(samplers), dtype=np.int32)
    if random_rows:
        some = logits if len(random_rows) == len(samplers) else logits[random_rows]
        ids[random_rows] = runner.sample(some, [samplers[row].draw() for row in random_rows])
    choices: list[Choice | ValueError] = [errors.get(row) or Choice(token) for row, token in enumerate(ids.tolist())]
    for row in asking:
        if row not in errors:
            model = before.get(row, logits[row])
            wanted = samplers[row].sampling.logprobs or 0
            choices[row] = Choice(int(ids[row]), *logprobs_of(runner, model, int(ids[row]), wanted))
    return choices


def logprobs_of(runner: Runner, logits: Floats, token: int, wanted: int) -> tuple[float, dict[int, float]]:
    """ln p of a token under one row of logits, (V,), and the `wanted` likeliest ids with theirs, likeliest first."""
    lse = runner.statistics(logits[None])[0][0]
    return float(logits[token] - lse), _likeliest(logits, float(lse), wanted)


def prompt_logprobs(
    runner: Runner, logits: Floats, tokens: Sequence[int], wanted: int
) -> list[tuple[float, dict[int, float]]]:
    """`logprobs_of` for each row of logits, (R, V), with its token."""
    lse = runner.statistics(logits)[0]
    given = (logits[np.arange(len(tokens)), list(tokens)] - lse).tolist()
    return [(p, _likeliest(row, float(z), wanted)) for p, row, z in zip(given, logits, lse)]


def _likeliest(logits: Floats, lse: float, wanted: int) -> dict[int, float]:
    count = min(wanted, len(logits))
    best = np.argpartition(-logits, count - 1)[:count] if 0 < count < len(logits) else np.arange(count)
    best = best[np.lexsort((best, -logits[best]))]
    return {int(i): float(logits[i] - np.float32(lse)) for i in best}
