"""/v1/completions: text, or token ids, continued."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from llmkit.generation import Detokenizer
from llmkit.tokenizer import Tokenizer
from llmkit_http.completion_schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from llmkit_http.errors import bad_request
from llmkit_http.jobs import Job, Piece, TokenLogprob
from llmkit_http.limits import warning_header
from llmkit_http.models import Model
from llmkit_http.prompts import encode_prompts
from llmkit_http.schemas import ERRORS, Usage
from llmkit_http.service import FINGERPRINT, Service, service
from llmkit_http.sse import ChunkEvents, EventStream, unless_gone
from llmkit_http.text import token_text

router = APIRouter(responses=ERRORS)
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", response_model=Completion, tags=["OpenAI"], summary="Continue text")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    at = service(request)
    model = at.models.find(body.model)
    n = at.check_n(body.n)
    if body.suffix:
        raise bad_request("suffix: inserting text between two others is not supported", "suffix")
    if body.best_of is not None and body.best_of != n:
        raise bad_request("best_of: only a value equal to n is supported; ask for n answers and choose", "best_of")
    prompts, texts = await encode_prompts(model, body.prompt)
    job = _job(at, model, body, prompts, n)
    answer = _Answer(model, body, job, texts)
    headers = warning_header(body.model_extra or {})
    if body.stream:
        return EventStream(answer.events(), job.cancel, headers)
    samples = await unless_gone(request, job.result())
    return Response(answer.whole(samples).model_dump_json(), media_type="application/json", headers=headers)


def _job(at: Service, model: Model, body: CompletionRequest, prompts: Sequence[tuple[int, ...]], n: int) -> Job:
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    at.check_max_tokens(wanted, "max_tokens")
    echoed = body.logprobs if body.echo else None
    if echoed is not None and not model.engine.gives_prompt_logprobs:
        raise bad_request(
            f"echo: engine {model.engine.name!r} does not give log-probabilities of a prompt; leave out logprobs",
            "echo",
        )
    sampling = body.sampling(max_tokens=max(wanted, 1), logprobs=body.logprobs, prompt_logprobs=echoed)
    return at.job(model, prompts, sampling, stop=body.stop_strings(), n=n)


class _Answer:
    """Turns the pieces of a job into the answer, whole or as events."""

    def __init__(self, model: Model, body: CompletionRequest, job: Job, texts: Sequence[str | None]) -> None:
        self._body, self._job = body, job
        self._tokenizer = model.checkpoint.tokenizer
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = body.model or model.names[0]
        self._prefix = [""] * len(texts)
        if body.echo:
            self._prefix = [
                _shown(self._tokenizer, ids) if text is None else text for ids, text in zip(job.prompts, texts)
            ]
        self._nothing = body.max_tokens == 0  # only the prompt is wanted

    def whole(self, samples: list[list[Piece]]) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(pieces) for pieces in samples],
            usage=self._usage(),
            system_fingerprint=FINGERPRINT,
        )

    def _usage(self) -> Usage:
        return Usage.of(self._job.prompt_tokens, 0 if self._nothing else self._job.completion_tokens)

    def _choice(self, pieces: list[Piece]) -> CompletionChoice:
        """The choice of a sample from all its pieces."""
        index = pieces[0].index
        prefix = self._prefix[index // self._job.n]
        reason = pieces[-1].finish_reason
        text = "" if self._nothing else "".join(piece.text for piece in pieces)
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
            for piece in pieces:
                self._add_logprobs(logprobs, piece, len(prefix))
        return CompletionChoice(
            index=index,
            text=prefix + text,
            logprobs=logprobs,
            finish_reason="length" if self._nothing or reason == "length" else "stop",
        )

    def _add_logprobs(self, logprobs: CompletionLogprobs, piece: Piece, offset: int) -> None:
        if self._body.echo:
            entries = self._with_offsets(piece.prompt_logprobs)
            _append(logprobs, entries, self._tokenizer, 0)
        if not self._nothing:
            _append(logprobs, piece.logprobs, self._tokenizer, offset)

    def _with_offsets(self, entries: list[TokenLogprob]) -> list[TokenLogprob]:
        """The entries of a prompt with where each token's text begins in it."""
        at, placed = 0, []
        detokenizer = Detokenizer(self._tokenizer)
        for entry in entries:
            placed.append(TokenLogprob(entry.id, entry.logprob, entry.top, at))
            at += len(detokenizer.add((entry.id,)))
        return placed

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        base = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
        }
        chunks = ChunkEvents(base, self._body.stream_options)
        begun = [not prefix for prefix in self._prefix for _ in range(self._job.n)]
        async for pieces in self._job.pieces():
            events = []
            for piece in pieces:
                if self._nothing:
                    piece.text, piece.logprobs = "", []
                logprobs = None
                if self._body.logprobs is not None:
                    logprobs = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
                    self._add_logprobs(logprobs, piece, len(self._prefix[piece.index // self._job.n]))
                if not begun[piece.index]:
                    begun[piece.index] = True
                    piece.text = self._prefix[piece.index // self._job.n] + piece.text
                reason = piece.finish_reason and ("length" if self._nothing else piece.finish_reason)
                events.append(
                    chunks.choice(
                        piece.index,
                        text=json.dumps(piece.text),
                        logprobs=logprobs.model_dump_json() if logprobs else "null",
                        finish_reason=f'"{reason}"' if reason else "null",
                    )
                )
            yield b"".join(events)
        yield chunks.end(self._usage())


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a prompt that was given as ids, without its special tokens."""
    detokenizer = Detokenizer(tokenizer)
    return detokenizer.add(ids) + detokenizer.finish()


def _append(logprobs: CompletionLogprobs, entries: list[TokenLogprob], tokenizer: Tokenizer, offset: int) -> None:
    for entry in entries:
        logprobs.tokens.append(token_text(tokenizer, entry.id))
        logprobs.token_logprobs.append(entry.logprob)
        logprobs.text_offset.append(offset + entry.offset)
        top = None
        if entry.logprob is not None:
            top = {token_text(tokenizer, index): value for index, value in entry.top.items()}
            top[token_text(tokenizer, entry.id)] = entry.logprob
        logprobs.top_logprobs.append(top)
