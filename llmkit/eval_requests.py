"""Requests of evaluation tasks as token ids, by lm-eval's rules, so that results can be compared.

- The context of a log-likelihood is encoded as a prompt (with the begin token where the checkpoint's tokenizer adds
  one), its trailing spaces moved to the continuation; the continuation is what encoding both together adds.
- An empty context becomes the begin token, else the end-of-text token.
- A text as a whole is cut into disjoint windows; the first is predicted from the begin or end-of-text token, and the
  last takes all the context that fits.
- What is too long loses its left end.
- A rendered conversation has its special tokens in its text; the begin token is added unless it begins with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmkit.engine import Engine, Sampling, ScoreRequest
from llmkit.eval_cache import AnswerCache, Ids, score_key, text_key
from llmkit.eval_chat import Conversation
from llmkit.evaluator import (
    Answer,
    Document,
    Generate,
    Likelihood,
    LogLikelihood,
    Request,
    RollingLogLikelihood,
    TokenLogLikelihood,
)
from llmkit.generation import TextRequest, complete
from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and the continuation to score after it. `truncated`: tokens were cut off to make them fit."""

    context: Ids
    continuation: Ids
    truncated: bool = False


class Encoder:
    """Encodes requests for a model of `context_length` positions."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Raises ValueError where the tokenizer has no token to begin a text with."""
        prefix = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        if prefix is None:
            raise ValueError("the model's tokenizer has neither a begin nor an end-of-text token to begin a text with")
        self.tokenizer, self.context_length, self.prefix = tokenizer, context_length, prefix
        self._begin = next((text for text, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id), None)
        self._last: tuple[str, bool, Ids] = ("", False, ())  # the choices of a question share their context

    def pair(self, request: LogLikelihood | TokenLogLikelihood) -> Pair:
        """Raises ValueError where the continuation has no tokens."""
        if isinstance(request, TokenLogLikelihood):
            return self._fitted(request.context, request.continuation)
        chat = isinstance(request.context, Conversation)
        text = request.context.rstrip()
        continuation = request.context[len(text) :] + request.continuation
        context = self._context(text, chat)
        if text:
            ids = self._encode(text + continuation, chat)[len(context) :]
        else:
            ids = tuple(self.tokenizer.encode(continuation))
        if not ids:
            raise ValueError(f"the continuation {continuation!r} has no tokens")
        return self._fitted(context, ids)

    def _fitted(self, context: Ids, continuation: Ids) -> Pair:
        """What fits the model, from the right."""
        whole = (context + continuation)[-(self.context_length + 1) :]
        kept = min(len(continuation), self.context_length)
        return Pair(whole[:-kept], whole[-kept:], len(whole) < len(context) + len(continuation))

    def _context(self, text: str, chat: bool) -> Ids:
        if not text:
            return (self.prefix,)
        if self._last[:2] != (text, chat):
            self._last = (text, chat, self._encode(text, chat))
        return self._last[2]

    def _encode(self, text: str, chat: bool) -> Ids:
        if chat and self._begin is not None and text.startswith(self._begin):
            return tuple(self.tokenizer.encode(text, allow_special=True))
        return tuple(self.tokenizer.encode_prompt(text, allow_special=chat))

    def windows(self, text: str) -> list[Pair]:
        """A whole text: each of its tokens is in one continuation."""
        ids = tuple(self.tokenizer.encode(text))
        length = self.context_length
        windows = [Pair((self.prefix,), ids[:length])] if ids else []
        for start in range(length, len(ids), length):
            end = min(start + length, len(ids))
            windows.append(Pair(ids[end - length - 1 : start], ids[start:end]))
        return windows

    def prompt(self, request: Generate) -> tuple[Ids, bool]:
        """Ids of a prompt, and whether it was cut so that `max_tokens` (at most half the context) have room."""
        length = self.context_length
        room = length - (request.max_tokens if request.max_tokens < length else length // 2)
        ids = self._encode(request.prompt, isinstance(request.prompt, Conversation)) or (self.prefix,)
        return ids[-room:], len(ids) > room


@dataclass(slots=True)
class OpenDocument:
    """A document with its requests, and the parts of their answers that are there: one, or one for each window."""

    task: str
    index: int
    document: Document
    requests: list[Request]
    parts: list[list[Answer | None]] = field(default_factory=list)
    waiting: int = 0
    truncated: bool = False

    def answers(self) -> list[Answer]:
        """The answers in the order of the requests, when nothing is waited for any more."""
        assert self.waiting == 0
        return [_answer(parts) for parts in self.parts]


def _answer(parts: list[Answer | None]) -> Answer:
    if parts and isinstance(parts[0], str):
        return parts[0]
    windows = [part for part in parts if isinstance(part, Likelihood)]
    return Likelihood(
        logprob=math.fsum(window.logprob for window in windows),
        is_greedy=all(window.is_greedy for window in windows),
        tokens=sum(window.tokens for window in windows),
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a result belongs: part `part` of the answer to request `request` of a document."""

    document: OpenDocument
    request: int
    part: int = 0


class Wave:
    """Documents whose requests go to the engine together. Identical requests are computed once.

    `tokens` counts what is held in memory; `cached` the answers that were there from before.
    """

    def __init__(self, encoder: Encoder, seed: int, cache: AnswerCache | None = None) -> None:
        self._encoder, self._seed, self._cache = encoder, seed, cache
        self._scores: dict[tuple[Ids, Ids], list[_Slot]] = {}
        self._texts: dict[tuple[Ids, tuple[str, ...], Sampling], list[_Slot]] = {}
        self._answered: list[OpenDocument] = []  # documents that ask nothing
        self.tokens = self.documents = self.cached = 0

    def add(self, document: OpenDocument) -> None:
        """Raises ValueError, naming task and document, for a request that cannot be asked."""
        self.documents += 1
        for number, request in enumerate(document.requests):
            try:
                if isinstance(request, Generate):
                    self._add_text(_Slot(document, number), request)
                else:
                    self._add_pairs(document, number, request)
            except ValueError as error:
                raise ValueError(f"task {document.task!r}, document {document.index}: {error}") from None
        if not document.waiting:
            self._answered.append(document)

    def _add_pairs(self, document: OpenDocument, number: int, request: Request) -> None:
        assert not isinstance(request, Generate)
        if isinstance(request, RollingLogLikelihood):
            pairs = self._encoder.windows(request.text)
        else:
            pairs = [self._encoder.pair(request)]
        document.parts.append([None] * len(pairs))
        document.waiting += len(pairs)
        for part, pair in enumerate(pairs):
            document.truncated |= pair.truncated
            self._scores.setdefault((pair.context, pair.continuation), []).append(_Slot(document, number, part))
            self.tokens += len(pair.context) + len(pair.continuation)

    def _add_text(self, slot: _Slot, request: Generate) -> None:
        ids, truncated = self._encoder.prompt(request)
        sampling = Sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=_seed(self._seed, slot) if request.temperature > 0 else 0,
        )
        slot.document.parts.append([None])
        slot.document.waiting += 1
        slot.document.truncated |= truncated
        self._texts.setdefault((ids, request.stop, sampling), []).append(slot)
        self.tokens += len(ids)

    def run(self, engine: Engine) -> Iterator[OpenDocument]:
        """The documents as their last answers arrive."""
        yield from self._answered
        pairs: list[tuple[tuple[Ids, Ids], bytes, list[_Slot]]] = []
        for pair, slots in self._scores.items():
            key = score_key(*pair)
            if (known := self._known(key)) is None:
                pairs.append((pair, key, slots))
            else:
                yield from _deliver(slots, known)
        for result in engine.score(ScoreRequest(i, *pair) for i, (pair, _, _) in enumerate(pairs)):
            _, key, slots = pairs[result.id]
            answer = Likelihood(math.fsum(result.logprobs), result.is_greedy, len(result.logprobs))
            yield from _deliver(slots, self._kept(key, answer))
        prompts: list[tuple[tuple[Ids, tuple[str, ...], Sampling], bytes, list[_Slot]]] = []
        for prompt, slots in self._texts.items():
            key = text_key(*prompt)
            if (known := self._known(key)) is None:
                prompts.append((prompt, key, slots))
            else:
                yield from _deliver(slots, known)
        wanted = (TextRequest(i, ids, sampling, stop) for i, ((ids, stop, sampling), _, _) in enumerate(prompts))
        for completion in complete(engine, self._encoder.tokenizer, wanted):
            _, key, slots = prompts[completion.id]
            yield from _deliver(slots, self._kept(key, completion.text))

    def _known(self, key: bytes) -> Answer | None:
        answer = None if self._cache is None else self._cache.get(key)
        self.cached += answer is not None
        return answer

    def _kept(self, key: bytes, answer: Answer) -> Answer:
        if self._cache is not None:
            self._cache.put(key, answer)
        return answer


def _deliver(slots: list[_Slot], answer: Answer) -> Iterator[OpenDocument]:
    """Put an answer where it is waited for; the documents that are complete with it."""
    for slot in slots:
        slot.document.parts[slot.request][slot.part] = answer
        slot.document.waiting -= 1
        if not slot.document.waiting:
            yield slot.document


def _seed(seed: int, slot: _Slot) -> int:
    """A seed for a sampled answer that depends on the run's seed and the document, not on limit, order or batches."""
    key = f"{seed}\0{slot.document.task}\0{slot.document.index}\0{slot.request}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
