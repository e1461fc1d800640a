"""An engine for tests of chats: a plugin, found where PYTHONPATH has its folder, that answers as it is told.

A checkpoint's tokenizer is `byte`, so that it reads its prompt, and its template writes messages as `<user>…`. The last
message tells it what to say: `say TEXT`, `slowly TEXT` (a character each 20 ms), `prompt?` for all that it was given,
`sampling?` for the parameters. A text without messages gets " and so on." slowly.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from llmkit import hookimpl
from llmkit.checkpoint import Checkpoint
from llmkit.engine import Chunk, Engine, FinishReason, GenerateRequest, ScoreRequest, ScoreResult


class ScriptedEngine(Engine):
    """Says what it is told."""

    name = "scripted"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.vocab_size = checkpoint.config["vocab_size"]
        self.context_length = checkpoint.config["n_positions"]
        self.eos_ids = checkpoint.eos_ids
        self.dtype = "fp32"
        self._tokenizer = checkpoint.tokenizer
        self._cancelled: set[int] = set()

    @classmethod
    def open(cls, checkpoint: Checkpoint, **_: Any) -> ScriptedEngine:
        return cls(checkpoint)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        raise NotImplementedError

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        for request in requests:
            yield from self._generate(request)

    def _generate(self, request: GenerateRequest) -> Iterator[Chunk]:
        text, pause = self._script(request)
        ids = self._tokenizer.encode(text)
        allowed = min(request.sampling.max_tokens, self.context_length - len(request.prompt))
        end: FinishReason = "stop" if len(ids) <= allowed else "length"
        for token in ids[:allowed]:
            if request.id in self._cancelled:
                end = "cancelled"
                break
            time.sleep(pause)
            yield Chunk(request.id, (token,))
        yield Chunk(request.id, (), finish_reason=end)

    def _script(self, request: GenerateRequest) -> tuple[str, float]:
        prompt = self._tokenizer.decode(request.prompt)
        if not prompt.endswith("<assistant>"):
            return " and so on.", 0.02
        told = prompt.removesuffix("<assistant>").rsplit("<user>", 1)[-1]
        if told.startswith("say "):
            return told.removeprefix("say "), 0.0
        if told.startswith("slowly "):
            return told.removeprefix("slowly "), 0.02
        if told == "sampling?":
            s = request.sampling
            return f"temperature {s.temperature}, top_k {s.top_k}, max_tokens {s.max_tokens}", 0.0
        return prompt if told == "prompt?" else f"You said: {told}", 0.0

    def cancel(self, request_id: int) -> None:
        self._cancelled.add(request_id)


@hookimpl
def llmkit_register_engines() -> list[type[Engine]]:
    return [ScriptedEngine]
