"""Job: the generations of one HTTP request, as text that comes in pieces; cancelled together."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from llmkit.engine import Chunk, FinishReason, GenerateRequest, Sampling
from llmkit.generation import Detokenizer, StopStrings
from llmkit_http.errors import APIError, bad_request, unavailable

if TYPE_CHECKING:
    from llmkit.engine import Constraint
    from llmkit_http.limits import Admission
    from llmkit_http.metrics import Metrics
    from llmkit_http.models import Model

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability in nats (None where nothing is before it) and the likeliest alternatives.

    `offset`: where its text begins, in characters of the answer.
    """

    id: int
    logprob: float | None
    top: Mapping[int, float]
    offset: int


@dataclass(slots=True)
class Piece:
    """More of sample `index`. The last piece of a sample, and only that, has a `finish_reason`."""

    index: int
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Sample:
    """One generation: makes text of its chunks, cut at the stop strings."""

    def __init__(self, index: int, request: GenerateRequest, model: Model, stop: Sequence[str]) -> None:
        self.index, self.request = index, request
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(model.checkpoint.tokenizer, request.prompt)
        self._stops = StopStrings(stop)
        self._emitted = self._seen = 0  # characters: given out; of all tokens
        self._held: list[TokenLogprob] = []  # of tokens whose text is not given out yet

    def add(self, chunk: Chunk) -> Piece:
        """What a chunk adds. After a finish_reason, which a stop string gives too, nothing more may be added."""
        reason = chunk.finish_reason
        self.tokens += len(chunk.tokens)
        text = self._decode(chunk) if chunk.logprobs else self._detokenizer.add(chunk.tokens)
        if reason:
            text += self._detokenizer.finish()
        text, stopped = self._stops.add(text)
        if stopped:
            reason = "stop"
        elif reason:
            text += self._stops.finish()
        self._emitted += len(text)
        self.finish_reason = reason
        given = self._held
        if given and not (reason and not stopped):  # else the answer is whole, and so are its tokens
            given = [entry for entry in self._held if entry.offset < self._emitted]
        self._held = self._held[len(given) :]
        return Piece(self.index, text, given, reason, self._prompt(chunk) if chunk.prompt_logprobs else [])

    def _decode(self, chunk: Chunk) -> str:
        """The chunk's text, token by token, for where in it each begins."""
        text = ""
        for token, logprob, top in zip(chunk.tokens, chunk.logprobs, chunk.top_logprobs):
            self._held.append(TokenLogprob(token, logprob, top, self._seen))
            new = self._detokenizer.add((token,))
            self._seen += len(new)
            text += new
        return text

    def _prompt(self, chunk: Chunk) -> list[TokenLogprob]:
        prompt = self.request.prompt
        first = TokenLogprob(prompt[0], None, {}, 0)
        return [first, *map(TokenLogprob, prompt[1:], chunk.prompt_logprobs, chunk.prompt_top_logprobs, prompt)]


class Job:
    """`n` samples of each of some prompts. Sample i is of prompt i // n.

    With a seed s, the samples of a prompt have the seeds s, s + 1, …
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        n: int = 1,
        constraint: Callable[[], Constraint] | None = None,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        """Queue the generations. Raises APIError for what does not fit the model, and where the queue is full."""
        self.model, self.prompts, self.n = model, prompts, n
        self.samples = [
            Sample(
                index,
                GenerateRequest(
                    next(_ids),
                    prompts[index // n],
                    sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index % n),
                    constraint and constraint(),
                ),
                model,
                stop,
            )
            for index in range(len(prompts) * n)
        ]
        for sample in self.samples:  # all, before any runs
            try:
                model.engine.check(sample.request)
            except ValueError as error:
                raise _refusal(error) from None
        self._admission, self._metrics = admission, metrics
        self._open = len(self.samples)  # not finished for us
        self._pieces: list[Piece] = []
        self._error: APIError | None = None
        self._streaming = False
        self._news = asyncio.Event()
        self._started = time.perf_counter()
        admission.enter(len(self.samples))
        metrics.started(model, self.prompt_tokens)
        for count, sample in enumerate(self.samples):
            try:
                model.streams.start(sample.request, _Receiver(self, sample))
            except RuntimeError as error:  # the engine has ended
                for _ in range(len(self.samples) - count):
                    admission.leave(0.0)
                self.cancel()
                raise unavailable(f"The model cannot answer: {error}") from error

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    async def result(self) -> list[list[Piece]]:
        """The pieces of each sample, when all are finished. Raises APIError. Cancelled, it cancels the generations."""
        by_sample: list[list[Piece]] = [[] for _ in self.samples]
        try:
            await self._wait()
        finally:
            self.cancel()
        for piece in self._pieces:
            by_sample[piece.index].append(piece)
        return by_sample

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, in lists of those that came meanwhile. Raises APIError. Leaving it early cancels."""
        self._streaming = True
        try:
            while self._open or self._pieces or self._error:
                if not self._pieces:
                    await self._wait()
                pieces, self._pieces = self._pieces, []
                if pieces:
                    yield pieces
        finally:
            self.cancel()

    async def _wait(self) -> None:
        """Until there are pieces, when streaming; until all are there, else. Raises what failed after them."""
        while self._error is None and self._open and not (self._streaming and self._pieces):
            self._news.clear()
            await self._news.wait()
        if self._error is not None and not (self._streaming and self._pieces):
            raise self._error

    def cancel(self) -> None:
        """End the generations that are not finished."""
        for sample in self.samples:
            if sample.finish_reason is None:
                sample.finish_reason = "cancelled"
                self._open -= 1
                self.model.streams.cancel(sample.request.id)
        self._news.set()

    def receive(self, sample: Sample, event: Chunk | Exception) -> None:
        """Take note of what the engine gives for a sample; called in the event loop."""
        ended = isinstance(event, Exception) or event.finish_reason is not None
        if sample.finish_reason is None:
            if isinstance(event, Exception):
                sample.finish_reason = "cancelled"
                self._fail(event)
            else:
                if event.tokens and not sample.tokens:
                    self._metrics.first_token(self.model, time.perf_counter() - self._started)
                piece = sample.add(event)
                if piece.text or piece.logprobs or piece.finish_reason or piece.prompt_logprobs:
                    self._pieces.append(piece)
                if piece.finish_reason and not ended:  # a stop string
                    self.model.streams.cancel(sample.request.id)
            if sample.finish_reason is not None:
                self._open -= 1
            if self._streaming or not self._open:
                self._news.set()
        if not isinstance(event, Exception):
            self._metrics.rate.add(len(event.tokens))
        if ended:
            seconds = time.perf_counter() - self._started
            self._admission.leave(seconds)
            self._metrics.ended(self.model, sample.tokens, seconds)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, ValueError):  # a constraint that allows nothing more
            self._error = _refusal(error)
        else:
            self._error = unavailable(f"The model cannot answer: {error}")
        self._news.set()


def _refusal(error: ValueError) -> APIError:
    """What an engine says of a request, "request 7: logit_bias has id …", in the client's terms."""
    message = str(error).partition(": ")[2] or str(error)
    first = message.split()[0].rstrip(":")
    return bad_request(message, first if first in {field.name for field in fields(Sampling)} else None)


class _Receiver:
    """Takes the events of one sample."""

    __slots__ = ("job", "sample")

    def __init__(self, job: Job, sample: Sample) -> None:
        self.job, self.sample = job, sample

    def __call__(self, event: Chunk | Exception) -> None:
        self.job.receive(self.sample, event)
