"""EmbeddedEngine: runs GPT-2 and Llama models on the CPU, compiled for this processor on first use.

Many requests run at once over a paged key-value cache of fixed size; common prefixes are computed once. A result does
not depend on its neighbours, the threads, chunks or cache hits, bit for bit. Heavy modules are imported when
a checkpoint is opened.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmkit.engine import Chunk, Engine, GenerateRequest, ScoreRequest, ScoreResult, UnsupportedModel
from llmkit_engine.models import architectures, describe

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit_engine.scheduler import Scheduler
    from llmkit_engine.score import Scorer
    from llmkit_engine.spec import ModelSpec

CACHE_BYTES = 2**30  # keys and values; memory is touched as it comes into use
STEP_TOKENS = (
    512  # a step's tokens: enough for the products' full speed, few enough that decoding requests do not stall
)
STEP_ROWS = 256  # a step's rows of logits
MAX_RUNNING = 128  # requests that run at once
SCORE_TOKENS = 2**18  # read ahead by `score`, to find common prefixes
SMALL_MODEL = 2**22  # bytes of weights below which threads cost more than they give


class EmbeddedEngine(Engine):
    """GPT-2 and Llama models on the CPU: continuous batching, shared prefixes, int8 weights. Needs a C compiler."""

    name: ClassVar[str] = "llmkit"
    requires: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]] = tuple(architectures())
    can_constrain: ClassVar[bool] = True
    gives_prompt_logprobs: ClassVar[bool] = True
    quantizations: ClassVar[tuple[str, ...]] = ("int8",)

    def __init__(
        self, scheduler: Scheduler, *, spec: ModelSpec, dtype: str, eos_ids: frozenset[int], context_length: int
    ) -> None:
        """Wrap a scheduler; `open` makes one."""
        self.scheduler = scheduler
        self.vocab_size, self.context_length = spec.vocab, context_length
        self.eos_ids, self.dtype = eos_ids, dtype
        self._lock = threading.Lock()  # one thread at a time in the scheduler
        self._scorers: list[Scorer] = []
        scheduler.reclaim = self._reclaim

    @classmethod
    def unavailable(cls) -> str | None:
        from llmkit_engine.build import no_compiler

        return super().unavailable() or no_compiler()

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        device: str | None = None,
        quantize: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        step_tokens: int = STEP_TOKENS,
        max_running: int = MAX_RUNNING,
        threads: int | None = None,
        fp32_inputs: bool | None = None,
    ) -> Self:
        """Load a checkpoint: `dtype` fp32 or bf16 for the weights (arithmetic is fp32), `quantize` None or int8.

        `cache_bytes` is all that keys and values ever take; where it holds less than the model's context, the context
        length is what it holds. `step_tokens` bounds the tokens of a step, `max_running` the requests that run at
        once. `fp32_inputs`: whether products with bf16 or int8 weights keep their inputs in fp32 where the processor
        has instructions for bf16 or bytes (None: as LLMKIT_ENGINE_FP32_INPUTS says, 1 or 0, else what is faster).

        Raises UnsupportedModel for an architecture that it does not know, CheckpointError for missing or damaged
        weights, BuildError where the library cannot be compiled, ValueError for another parameter.
        """
        try:
            spec = describe(checkpoint.architecture, checkpoint.config)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"engine 'llmkit' does not compute {error}") from None
        dtype = dtype or ("bf16" if _stored_dtype(checkpoint) == "bfloat16" else "fp32")
        if dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype: engine 'llmkit' has weights in fp32 or bf16, not {dtype}")
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize: engine 'llmkit' knows int8, not {quantize}")
        if device not in (None, "cpu"):
            raise ValueError(f"device: engine 'llmkit' runs on the CPU, not on {device}; --engine transformers can")
        for name, value in (
            ("step_tokens", step_tokens),
            ("max_running", max_running),
            ("threads", 1 if threads is None else threads),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

        from llmkit_engine.cache import Blocks
        from llmkit_engine.library import KV_BLOCK, library
        from llmkit_engine.runner import Runner, block_floats
        from llmkit_engine.scheduler import Scheduler
        from llmkit_engine.weights import Weights

        block_bytes = 4 * block_floats(spec) * len(spec.blocks)
        blocks = min(cache_bytes // block_bytes, 2 * max_running * (-(-spec.context // KV_BLOCK)))
        if blocks < 1:
            raise ValueError(f"cache_bytes is {cache_bytes}, but one block of this model takes {block_bytes}")
        context = min(spec.context, blocks * KV_BLOCK)
        many = threads or library().lk_threads()
        weights = Weights(checkpoint, spec, dtype=dtype, quantize=quantize, fp32_inputs=fp32_inputs, threads=many)
        if threads is None and weights.bytes < SMALL_MODEL:
            many = 1
        rows = min(STEP_ROWS, step_tokens)
        runner = Runner(spec, weights, context=context, blocks=blocks, tokens=step_tokens, rows=rows, threads=many)
        eos_ids = frozenset(i for i in checkpoint.eos_ids if i < spec.vocab)
        scheduler = Scheduler(runner, Blocks(blocks), eos_ids=eos_ids, context=context, max_running=max_running)
        return cls(scheduler, spec=spec, dtype=quantize or dtype, eos_ids=eos_ids, context_length=context)

    def close(self) -> None:
        with self._lock:
            self.scheduler.runner.close()

    # --- generate

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        """Several calls may run at once, from one thread or many; their requests share the steps."""
        chunks: deque[Chunk | ValueError] = deque()
        mine: set[int] = set()
        source = iter(requests)
        more = True
        try:
            while mine or more:
                while more and len(mine) < 2 * self.scheduler.max_running:  # some wait, so that the batch stays full
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    self.submit(request, chunks.append)
                    mine.add(request.id)
                if not chunks:
                    self.step()
                while chunks:
                    chunk = chunks.popleft()
                    if isinstance(chunk, ValueError):
                        raise chunk
                    if chunk.finish_reason is not None:
                        mine.discard(chunk.id)
                    yield chunk
        finally:
            with self._lock:
                self.scheduler.drop(mine)

    def submit(self, request: GenerateRequest, sink: Any) -> None:
        """Queue a request whose chunks, or final ValueError, go to `sink`, called during `step`. Raises ValueError."""
        self.check(request)
        with self._lock:
            self.scheduler.add(request, sink)

    def step(self) -> bool:
        """Run one step of all generations; whether there is more to do."""
        with self._lock:
            self.scheduler.step()
            return self.scheduler.busy

    def cancel(self, request_id: int) -> None:
        self.scheduler.cancel(request_id)

    # --- score

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for pool in self._pools(requests):
            yield from self._score_pool(pool)

    def _pools(self, requests: Iterable[ScoreRequest]) -> Iterator[list[ScoreRequest]]:
        """Checked requests in lists of about SCORE_TOKENS tokens."""
        pool: list[ScoreRequest] = []
        tokens = 0
        for request in requests:
            self.check(request)
            pool.append(request)
            tokens += len(request.context) + len(request.continuation)
            if tokens >= SCORE_TOKENS:
                yield pool
                pool, tokens = [], 0
        if pool:
            yield pool

    def _score_pool(self, pool: list[ScoreRequest]) -> Iterator[ScoreResult]:
        from llmkit_engine.score import Scorer

        scorer = Scorer(self.scheduler, pool)
        with self._lock:
            self._scorers.append(scorer)
        try:
            while not scorer.done:
                with self._lock:
                    results = scorer.step()
                yield from results
        finally:
            with self._lock:
                self._scorers.remove(scorer)
                scorer.give_back()

    def _reclaim(self) -> None:
        """Blocks that scorers hold, for a generation that has none left; under the lock."""
        for scorer in self._scorers:
            scorer.give_back()


def _stored_dtype(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
