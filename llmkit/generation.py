"""Text around an engine: streams text for prompts, cut at stop strings, with several samples for a prompt.

Engines know token ids only. `TextGenerator` turns their chunks into text that never ends within a character, and holds
back what may become a stop string until that is decided.
"""

from __future__ import annotations

import codecs
import itertools
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from llmkit.engine import Chunk, Engine, FinishReason, GenerateRequest, Sampling
from llmkit.tokenizer import Tokenizer

_engine_ids = itertools.count()  # one sequence for the process, so that generators can share an engine


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Ask for `n` continuations of `prompt` (token ids), each cut before the first of the `stop` strings in it.

    With `sampling.seed` s, the samples have the seeds s, s + 1, …, so that each can be had again alone. The
    log-probabilities of the prompt, where `sampling` asks for them, come with the first sample only.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is out of range: {self.n}")
        if "" in self.stop:
            raise ValueError("a stop string is empty")


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More text of one sample of a request. The last piece of a sample, and only that, has a `finish_reason`.

    `chunk` is what the engine gave for it (its tokens and log-probabilities), `tokens` how many tokens the sample has
    so far; tokens whose text is held back or cut off count too.
    """

    id: int
    sample: int
    text: str
    tokens: int
    seed: int
    chunk: Chunk
    finish_reason: FinishReason | None = None


class Detokenizer:
    """Turns the tokens of one continuation into text as they come.

    Special tokens, and ids that only the model's padding knows, give no text. Where nothing of `prompt` is text, the
    continuation begins a text, and loses the space that some tokenizers write in front of one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_tokens.values())
        self._begins = not any(self._visible(token) for token in prompt)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _visible(self, token: int) -> bool:
        return token not in self._special and token < self._tokenizer.vocab_size

    def add(self, tokens: Iterable[int]) -> str:
        """The text that these tokens add; the bytes of an unfinished character are held back."""
        ids = [token for token in tokens if self._visible(token)]
        text = self._utf8.decode(self._tokenizer.decode_bytes(ids))
        if self._begins and ids:
            self._begins = False
            if text.startswith(" ") and not self._tokenizer.decode(ids).startswith(" "):
                text = text[1:]
        return text

    def finish(self) -> str:
        """What is held back: U+FFFD for a character that was never finished."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Watches a stream of text for strings at which it ends. Text that may begin one is held back.

    The string that is complete first counts, whatever the pieces in which the text comes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was found). After one, nothing more may be added."""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        keep = next((n for n in range(self._longest(text), 0, -1) if self._begins_stop(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What is held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest(self, text: str) -> int:
        return min(max((len(stop) - 1 for stop in self._stops), default=0), len(text))

    def _begins_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)


@dataclass(slots=True)
class _Sample:
    """One sample of a request while it runs."""

    request: TextRequest
    index: int
    seed: int
    detokenizer: Detokenizer
    stops: StopStrings
    tokens: int = 0


class TextGenerator:
    """Streams text from an engine for many requests at once."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._running: dict[int, _Sample] = {}  # by the engine's id

    def stream(self, requests: Iterable[TextRequest]) -> Iterator[TextPiece]:
        """Pieces as they come; every sample of every request ends with one that has a finish_reason.

        Raises ValueError, naming the request, for one that does not fit the engine.
        """
        for chunk in self.engine.generate(self._expand(requests)):
            sample = self._running.get(chunk.id)
            if sample is None:  # cut at a stop string before; the engine is only finishing it
                continue
            piece = self._piece(sample, chunk)
            if piece.finish_reason:
                del self._running[chunk.id]
                if chunk.finish_reason is None:
                    self.engine.cancel(chunk.id)
            if piece.text or piece.finish_reason:
                yield piece

    def cancel(self, request_id: int) -> None:
        """End all samples of a request with finish_reason "cancelled". To be called between pieces."""
        for engine_id, sample in self._running.items():
            if sample.request.id == request_id:
                self.engine.cancel(engine_id)

    def _expand(self, requests: Iterable[TextRequest]) -> Iterator[GenerateRequest]:
        for request in requests:
            base = secrets.randbits(32) if request.sampling.seed is None else request.sampling.seed
            for index in range(request.n):
                engine_id = next(_engine_ids)
                self._running[engine_id] = _Sample(
                    request,
                    index,
                    base + index,
                    Detokenizer(self.tokenizer, request.prompt),
                    StopStrings(request.stop),
                )
                sampling = replace(request.sampling, seed=base + index)
                if index:
                    sampling = replace(sampling, prompt_logprobs=None)
                yield GenerateRequest(engine_id, request.prompt, sampling)

    @staticmethod
    def _piece(sample: _Sample, chunk: Chunk) -> TextPiece:
        reason = chunk.finish_reason
        sample.tokens += len(chunk.tokens)
        text = sample.detokenizer.add(chunk.tokens)
        if reason:
            text += sample.detokenizer.finish()
        text, stopped = sample.stops.add(text)
        if stopped:
            reason = "stop"
        elif reason:
            text += sample.stops.finish()
        return TextPiece(sample.request.id, sample.index, text, sample.tokens, sample.seed, chunk, reason)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sample: its whole text, how many tokens it took, why it ended, the seed that gives it again."""

    id: int
    sample: int
    text: str
    tokens: int
    finish_reason: FinishReason
    seed: int


def complete(engine: Engine, tokenizer: Tokenizer, requests: Iterable[TextRequest]) -> Iterator[Completion]:
    """The completions of all requests as they finish, in any order."""
    texts: dict[tuple[int, int], list[str]] = {}
    for piece in TextGenerator(engine, tokenizer).stream(requests):
        parts = texts.setdefault((piece.id, piece.sample), [])
        parts.append(piece.text)
        if piece.finish_reason:
            del texts[piece.id, piece.sample]
            yield Completion(piece.id, piece.sample, "".join(parts), piece.tokens, piece.finish_reason, piece.seed)
