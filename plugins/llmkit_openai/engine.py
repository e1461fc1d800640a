"""OpenAIEngine: scores and generates through /v1/completions of a remote endpoint.

The checkpoint on this machine gives the tokenizer and the limits; the endpoint must serve the same model, since prompts
go to it as token ids. Scoring asks for the prompt back with its log-probabilities (`echo`), which servers of open
models give. Several requests are under way at once; the client library repeats what fails for a passing reason.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmkit.engine import Chunk, Engine, GenerateRequest, ScoreRequest, ScoreResult
from llmkit_openai.protocol import EndpointError, Reply, call, connect, sampling_fields, scores

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint

CONCURRENCY = 16  # requests under way at once
BATCH_TOKENS, BATCH_PROMPTS = 2**13, 32  # of one request that scores


Arrivals = queue.SimpleQueue[tuple[threading.Event, Chunk | BaseException]]


class OpenAIEngine(Engine):
    """A model behind an OpenAI-compatible endpoint (--engine-url; OPENAI_API_KEY)."""

    name: ClassVar[str] = "openai"
    requires: ClassVar[tuple[str, ...]] = ("openai",)
    remote: ClassVar[bool] = True

    def __init__(self, client: Any, model: str, checkpoint: Checkpoint, *, limit: int, identity: str) -> None:
        """`limit` is the endpoint's, in tokens of prompt and answer together."""
        self._client, self._model = client, model
        self._tokenizer = checkpoint.tokenizer
        self.vocab_size = int(checkpoint.config["vocab_size"])
        # Scoring sends one token more than a model is fed, and the endpoint insists on generating one behind it.
        self.context_length = limit - 2
        self.eos_ids = checkpoint.eos_ids
        self.dtype = "remote"
        self.identity = identity
        self._cancelled: dict[int, threading.Event] = {}

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        device: str | None = None,
        url: str | None = None,
        model: str | None = None,
    ) -> Self:
        """Connect. `url` is the endpoint's, up to /v1 (None: $OPENAI_BASE_URL); `model` its name there (None: the only
        one). Raises ValueError where it cannot be reached, has several models, or for a `dtype` or `device`."""
        if dtype is not None or device is not None:
            raise ValueError("engine 'openai' runs elsewhere: dtype and device are the endpoint's affair")
        client, found, limit = connect(url, model)
        own = _own_limit(checkpoint)
        limits = [length for length in (limit, own) if length is not None]
        if not limits:
            raise ValueError(f"neither the endpoint nor {checkpoint.path} says how long the model's context is")
        return cls(client, found.id, checkpoint, limit=min(limits), identity=f"{client.base_url} {found}")

    def close(self) -> None:
        self._client.close()

    # --- score

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            waiting: list[Future[list[ScoreResult]]] = []
            try:
                for batch in self._batches(requests):
                    waiting.append(pool.submit(self._score, batch))
                    while len(waiting) >= CONCURRENCY:
                        yield from waiting.pop(0).result()
                for future in waiting:
                    yield from future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, requests: Iterable[ScoreRequest]) -> Iterator[list[ScoreRequest]]:
        batch: list[ScoreRequest] = []
        tokens = 0
        for request in requests:
            self.check(request)
            size = len(request.context) + len(request.continuation)
            if batch and (tokens + size > BATCH_TOKENS or len(batch) >= BATCH_PROMPTS):
                yield batch
                batch, tokens = [], 0
            batch.append(request)
            tokens += size
        if batch:
            yield batch

    def _score(self, batch: list[ScoreRequest]) -> list[ScoreResult]:
        prompts = [[*request.context, *request.continuation] for request in batch]
        fields = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        answer = call(self._client, model=self._model, prompt=prompts, **fields)
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        if len(choices) != len(batch):
            raise EndpointError(f"the endpoint gave {len(choices)} answers to {len(batch)} prompts")
        return [scores(request, choice) for request, choice in zip(batch, choices)]

    # --- generate

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        arrived: Arrivals = queue.SimpleQueue()
        source = iter(requests)
        running: dict[int, threading.Event] = {}  # set where a request is cancelled, or nobody wants it any more
        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            while True:
                while len(running) < CONCURRENCY and (request := next(source, None)) is not None:
                    self.check(request)
                    if request.id in self._cancelled:
                        raise ValueError(f"request {request.id}: another one in flight has the same id")
                    running[request.id] = self._cancelled[request.id] = threading.Event()
                    pool.submit(self._generate, request, running[request.id], arrived)
                if not running:
                    return
                cancelled, chunk = arrived.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                if running.get(chunk.id) is not cancelled:
                    continue  # of a request that has ended as cancelled
                if cancelled.is_set():
                    chunk = Chunk(chunk.id, (), finish_reason="cancelled")
                if chunk.finish_reason is not None:
                    del running[chunk.id], self._cancelled[chunk.id]
                yield chunk
        finally:
            for request_id, cancelled in running.items():
                cancelled.set()
                del self._cancelled[request_id]
            pool.shutdown(wait=False, cancel_futures=True)

    def cancel(self, request_id: int) -> None:
        if request_id in self._cancelled:
            self._cancelled[request_id].set()

    def _generate(self, request: GenerateRequest, cancelled: threading.Event, arrived: Arrivals) -> None:
        """One request, in a thread of the pool."""
        try:
            for chunk in self._chunks(request, cancelled):
                arrived.put((cancelled, chunk))
        except BaseException as error:  # raised again by `generate`
            arrived.put((cancelled, error))

    def _chunks(self, request: GenerateRequest, cancelled: threading.Event) -> Iterator[Chunk]:
        room = self.context_length - len(request.prompt)
        fields = sampling_fields(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
        reply = Reply(request, self._tokenizer, self.eos_ids)
        if cancelled.is_set():
            yield Chunk(request.id, (), finish_reason="cancelled")
            return
        with call(self._client, model=self._model, prompt=list(request.prompt), stream=True, **fields) as stream:
            for event in stream:
                if cancelled.is_set():
                    yield Chunk(request.id, (), finish_reason="cancelled")
                    return
                if event.choices and (chunk := reply.add(event.choices[0])) is not None:
                    yield chunk
        yield Chunk(request.id, (), finish_reason="cancelled") if cancelled.is_set() else reply.finish()


def _own_limit(checkpoint: Checkpoint) -> int | None:
    """The context length in config.json."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    return next((checkpoint.config[name] for name in names if isinstance(checkpoint.config.get(name), int)), None)
