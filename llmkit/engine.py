"""Engine: computes log-likelihoods and generates tokens with a checkpoint.

An engine knows token ids only: tokenising, stop strings and chat templates are done around it (`llmkit.generation`).
Requests go in as an iterable and results come out as they finish, in any order, matched by `id`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from llmkit.component import Component

if TYPE_CHECKING:
    import numpy.typing as npt

    from llmkit.checkpoint import Checkpoint

    #: called before each token with those generated so far; which ids may come next, (vocab_size,) booleans
    Constraint = Callable[[tuple[int, ...]], npt.NDArray[Any]]

FinishReason = Literal["stop", "length", "cancelled"]


class UnsupportedModel(ValueError):
    """An engine does not run this architecture, or this variant of it. The message says what it lacks."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Ask for the log-likelihood of `continuation` after `context`.

    Both are non-empty tuples of token ids; together at most `context_length + 1` ids, since the last one is only
    predicted and never fed.
    """

    id: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`logprobs[i]` is ln p(continuation[i] | everything before it), in nats; `greedy[i]`: was it the argmax."""

    id: int
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        return all(self.greedy)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy: the argmax, lowest id at a tie.

    Filters apply in this order: penalties and bias, temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # CTRL's: divides positive and multiplies negative logits of tokens seen
    presence_penalty: float = 0.0  # OpenAI's: subtracted once for a token generated before
    frequency_penalty: float = 0.0  # OpenAI's: subtracted once per earlier occurrence
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added to the logits of these ids
    stop_token_ids: tuple[int, ...] = ()  # beside the checkpoint's own end tokens
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None  # None: a fresh one for each request
    logprobs: int | None = None  # report the log-probability of each token, and this many alternatives
    prompt_logprobs: int | None = None  # the same of the prompt's tokens

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "min_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "logprobs": self.logprobs is None or self.logprobs >= 0,
            "prompt_logprobs": self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "logit_bias": min(self.logit_bias, default=0) >= 0,
            "stop_token_ids": min(self.stop_token_ids, default=0) >= 0,
        }
        for name, valid in checks.items():
            if not valid:
                raise ValueError(f"{name} is out of range: {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Ask for a continuation of `prompt` (token ids, at least one, fewer than the context length).

    Prompt and continuation together fill at most the context length. `id` is unique among the requests in flight.
    `constraint`, for engines that `can_constrain`, limits each token to those that it allows, as for a JSON schema.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one request. The last chunk of a request, and only that, has a `finish_reason`.

    The token that ended it (an end token or one of `stop_token_ids`) is not among the tokens. Where log-probabilities
    are asked for, `logprobs[i]` is ln p of tokens[i] under the model, before any penalty, temperature or filter, and
    `top_logprobs[i]` the likeliest tokens, as many as were asked for, likeliest first; else both are empty.

    The first chunk of a request with `Sampling.prompt_logprobs` has those of its prompt: `prompt_logprobs[i]` is
    ln p(prompt[i + 1] | prompt[: i + 1]), so there is one value fewer than there are tokens.
    """

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Mapping[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[Mapping[int, float], ...] = ()


class Engine(Component, ABC):
    """Runs one checkpoint.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        context_length: most tokens that can be fed for one request.
        eos_ids: ids that end a generation, from the checkpoint.
        dtype: fp32 or bf16, what it computes in; of quantised weights their type.
        identity: of an engine that does not run the checkpoint's own files, what its answers depend on instead.

    An engine may read requests ahead of the results that it gives, to batch similar ones together; how far is bounded.
    """

    architectures: ClassVar[tuple[str, ...]] = ()  # class names in config.json that it runs; empty: it must be asked
    can_constrain: ClassVar[bool] = False  # whether it heeds GenerateRequest.constraint
    remote: ClassVar[bool] = False  # whether its `open` takes the `url` and `model` of an endpoint
    gives_prompt_logprobs: ClassVar[bool] = False  # whether it heeds Sampling.prompt_logprobs
    quantizations: ClassVar[tuple[str, ...]] = ()  # what its `open` takes as `quantize`
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]
    dtype: str
    identity: str = ""

    @classmethod
    @abstractmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        """Load a checkpoint. `dtype` fp32 or bf16 (None: the checkpoint's), `device` as in PyTorch (None: the best)."""

    @abstractmethod
    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """One result for each request. Raises ValueError, naming the request, for one that does not fit."""

    @abstractmethod
    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        """Chunks as they come; each request ends with exactly one chunk that has a finish_reason.

        "length" where max_tokens or the context is used up. A result does not depend on the other requests, but for
        rounding. Raises ValueError, naming the request, for one that does not fit.
        """

    @abstractmethod
    def cancel(self, request_id: int) -> None:
        """Stop a running request: called between chunks, it ends that request with finish_reason "cancelled".

        Does nothing for a request that has ended or is not known.
        """

    def close(self) -> None:
        """Free what the engine holds. It cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, request: ScoreRequest | GenerateRequest) -> None:
        """Raise ValueError, naming the request and what is wrong, unless this engine can run it."""
        label = f"request {request.id}"
        if isinstance(request, ScoreRequest):
            what, first, ids, limit = "context", request.context, request.context + request.continuation, 1
            if not request.continuation:
                raise ValueError(f"{label}: the continuation is empty")
        else:
            what, first, ids, limit = "prompt", request.prompt, request.prompt, -1
            if request.constraint is not None and not self.can_constrain:
                raise ValueError(f"{label}: engine {self.name!r} cannot generate under a constraint")
            if request.sampling.prompt_logprobs is not None and not self.gives_prompt_logprobs:
                raise ValueError(f"{label}: prompt_logprobs: engine {self.name!r} does not report them")
            for name in ("logit_bias", "stop_token_ids"):
                if (bad := max(getattr(request.sampling, name), default=0)) >= self.vocab_size:
                    raise ValueError(f"{label}: {name} has id {bad}, outside the vocabulary of {self.vocab_size}")
        if not first:
            raise ValueError(f"{label}: the {what} is empty")
        if len(ids) > self.context_length + limit:
            raise ValueError(
                f"{label}: {len(ids)} tokens, but the model's context leaves room for {self.context_length + limit}"
            )
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"{label}: token id {bad} is outside the vocabulary of {self.vocab_size}")
