"""TransformersEngine: scores and generates with a model of the transformers library, in padded batches.

It favours plain correctness over speed: other engines are tested against it. Requests are read ahead in pools, sorted
by length, and batched under a budget of tokens, so that little of a batch is padding; logits are computed only at the
positions that a request asks about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from llmkit.engine import Chunk, Engine, FinishReason, GenerateRequest, ScoreRequest, ScoreResult

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.checkpoint import Checkpoint
    from llmkit.sampling import Choice, Sampler

POOL_TOKENS = 2**18  # read ahead: enough to sort by length, small beside any model
BATCH_TOKENS = 2**13  # tokens of a forward pass, padding included
BATCH_LOGITS_BYTES = 2**28  # fp32 logits of a forward pass
SLICE = 2**8  # positions whose probabilities are worked out at once
CACHE_BYTES = 2**29  # keys and values of a batch that generates
BATCH_ROWS = 64  # requests that generate together
UNBOUNDED_CONTEXT = 2048  # for architectures without a limit (ALiBi): what lm-eval takes for them too

PromptLogprobs = tuple[tuple[float, ...], tuple[Mapping[int, float], ...]]  # as in Chunk
R = TypeVar("R", ScoreRequest, GenerateRequest)


class TransformersEngine(Engine):
    """Any causal language model that transformers loads."""

    name: ClassVar[str] = "transformers"
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    gives_prompt_logprobs: ClassVar[bool] = True

    def __init__(self, model: Any, *, context_length: int, eos_ids: frozenset[int], dtype: str) -> None:
        """Wrap a loaded PreTrainedModel in evaluation mode."""
        self.model = model
        self.device = model.device
        self.vocab_size = model.config.get_text_config().vocab_size
        self.context_length = context_length
        self.eos_ids = frozenset(i for i in eos_ids if i < self.vocab_size)
        self.dtype = dtype
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._in_flight: set[int] = set()
        self._cancelled: set[int] = set()

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        """Load a checkpoint's safetensors; its own code is never run.

        Raises CheckpointError for one that has no or pickled weights, lacks tensors or has them in other shapes, and
        ValueError for a recurrent architecture, whose state it cannot batch.
        """
        dtype = dtype or ("bf16" if _stored_dtype(checkpoint) == "bfloat16" else "fp32")  # fp16 fits into fp32
        model = _load(checkpoint, dtype, device or _best_device())
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"engine 'transformers' runs models with a key-value cache, and {type(model).__name__} has none"
            )
        length = _context_length(model.config.get_text_config())
        return cls(model, context_length=length, eos_ids=checkpoint.eos_ids, dtype=dtype)

    def close(self) -> None:
        del self.model

    # --- score

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for pool in _pools(requests, self.check, lambda r: len(r.context) + len(r.continuation)):
            rows: dict[tuple[int, ...], list[ScoreRequest]] = {}  # what is fed -> who asks about it
            for request in pool:
                rows.setdefault(request.context + request.continuation[:-1], []).append(request)
            longest_first = sorted(rows.items(), key=lambda row: len(row[0]), reverse=True)
            for batch in self._score_batches(longest_first):
                yield from self._score_batch(batch)

    def _score_batches(
        self, rows: Iterable[tuple[tuple[int, ...], list[ScoreRequest]]]
    ) -> Iterator[list[tuple[tuple[int, ...], list[ScoreRequest]]]]:
        """Cut rows, longest first, into batches within the budgets for tokens and logits."""
        batch: list[tuple[tuple[int, ...], list[ScoreRequest]]] = []
        positions: set[int] = set()
        for fed, asking in rows:
            wanted = positions | _positions(fed, asking)
            size = len(batch) + 1
            width = len(batch[0][0]) if batch else len(fed)
            logits = 4 * size * len(wanted) * self.vocab_size
            if batch and (size * width > BATCH_TOKENS or logits > BATCH_LOGITS_BYTES):
                yield batch
                batch, wanted = [], _positions(fed, asking)
            batch.append((fed, asking))
            positions = wanted
        if batch:
            yield batch

    def _score_batch(self, batch: Sequence[tuple[tuple[int, ...], list[ScoreRequest]]]) -> Iterator[ScoreResult]:
        import torch

        results: list[ScoreResult] = []
        kept = sorted(set().union(*(_positions(fed, asking) for fed, asking in batch)))
        column = {position: index for index, position in enumerate(kept)}
        ids, mask = self._padded([fed for fed, _ in batch], left=False)
        with torch.inference_mode():
            logits = self._forward(ids, mask, keep=torch.tensor(kept, device=self.device)).logits  # (B, K, V)
            for row, (fed, asking) in enumerate(batch):
                for request in asking:
                    first = len(fed) - len(request.continuation)  # logits here predict the first token asked about
                    at = [column[position] for position in range(first, len(fed))]
                    targets = torch.tensor(request.continuation, device=self.device).unsqueeze(1)  # (N, 1)
                    logprobs: list[float] = []
                    greedy: list[bool] = []
                    for start in range(0, len(at), SLICE):  # fp32 copies stay small, however long the request
                        values = logits[row, at[start : start + SLICE]].float()  # (n, V)
                        wanted = targets[start : start + SLICE]  # (n, 1)
                        logprobs += (values.gather(1, wanted).squeeze(1) - values.logsumexp(-1)).tolist()
                        greedy += (values.argmax(-1) == wanted.squeeze(1)).tolist()
                    results.append(ScoreResult(request.id, tuple(logprobs), tuple(greedy)))
        yield from results  # outside inference mode, which would hold for the caller too

    # --- generate

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        for pool in _pools(requests, self.check, lambda r: len(r.prompt)):
            ids = {request.id for request in pool}
            if len(ids) < len(pool) or ids & self._in_flight:
                raise ValueError("two requests in flight have the same id")
            self._in_flight |= ids
            try:
                for batch in self._generate_batches(sorted(pool, key=lambda r: len(r.prompt), reverse=True)):
                    yield from self._generate_batch(batch)
            finally:
                self._in_flight -= ids
                self._cancelled -= ids

    def cancel(self, request_id: int) -> None:
        if request_id in self._in_flight:
            self._cancelled.add(request_id)

    def _generate_batches(self, requests: Iterable[GenerateRequest]) -> Iterator[list[GenerateRequest]]:
        """Cut requests, longest prompt first, into batches within the budgets for tokens, cache and rows."""
        cache_tokens = CACHE_BYTES // _cache_bytes_per_token(self.model)
        batch: list[GenerateRequest] = []
        longest = 0  # tokens of the longest row, when it is complete
        for request in requests:
            width = len(batch[0].prompt) if batch else len(request.prompt)
            longest = max(longest, width + request.sampling.max_tokens)
            rows = len(batch) + 1
            if batch and (rows > BATCH_ROWS or rows * width > BATCH_TOKENS or rows * longest > cache_tokens):
                yield batch
                batch, longest = [], len(request.prompt) + request.sampling.max_tokens
            batch.append(request)
        if batch:
            yield batch

    def _generate_batch(self, batch: Sequence[GenerateRequest]) -> Iterator[Chunk]:
        import torch

        from llmkit.sampling import choose

        rows = [(request.id, self._sampler(request)) for request in batch if request.id not in self._cancelled]
        yield from (Chunk(r.id, (), finish_reason="cancelled") for r in batch if r.id in self._cancelled)
        if not rows:
            return
        running = {request_id for request_id, _ in rows}
        prompts = {r.id: self._prompt_logprobs(r) for r in batch if r.id in running}
        ids, mask = self._padded([request.prompt for request in batch if request.id in running], left=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T), 0 at the padding
        cache: Any = None
        while True:
            with torch.inference_mode():
                out = self._forward(ids, mask, keep=1, positions=positions, cache=cache, use_cache=True)
                choices = choose(out.logits[:, -1], [sampler for _, sampler in rows])
            cache = out.past_key_values
            going: list[int] = []
            for row, ((request_id, sampler), choice) in enumerate(zip(rows, choices)):
                if request_id in self._cancelled:
                    yield Chunk(request_id, (), finish_reason="cancelled")
                    continue
                reason = sampler.accept(choice.id)
                yield _chunk(request_id, choice, reason, prompts.pop(request_id, None))
                if reason is None:
                    going.append(row)
            for row in [row for row in going if rows[row][0] in self._cancelled]:
                going.remove(row)
                yield Chunk(rows[row][0], (), finish_reason="cancelled")
            if not going:
                return
            if len(going) < len(rows):
                kept = torch.tensor(going, device=self.device, dtype=torch.long)
                cache.batch_select_indices(kept)
                mask, positions = mask[kept], positions[kept]
            ids = torch.tensor([[choices[row].id] for row in going], device=self.device)  # (B, 1)
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
            positions = positions[:, -1:] + 1
            rows = [rows[row] for row in going]

    def _prompt_logprobs(self, request: GenerateRequest) -> PromptLogprobs | None:
        """What `Sampling.prompt_logprobs` asks for, by a forward pass of its own."""
        import torch

        wanted = request.sampling.prompt_logprobs
        if wanted is None or len(request.prompt) == 1:
            return None
        given: list[float] = []
        alternatives: list[Mapping[int, float]] = []
        ids, mask = self._padded([request.prompt[:-1]], left=False)
        targets = torch.tensor(request.prompt[1:], device=self.device).unsqueeze(1)  # (T - 1, 1)
        with torch.inference_mode():
            logits = self._forward(ids, mask, keep=torch.arange(ids.shape[1], device=self.device)).logits[0]
            for start in range(0, len(targets), SLICE):  # fp32 copies stay small, however long the prompt
                logprobs = logits[start : start + SLICE].float().log_softmax(-1)  # (n, V)
                given += logprobs.gather(1, targets[start : start + SLICE]).squeeze(1).tolist()
                best = logprobs.topk(min(wanted, self.vocab_size))
                alternatives += [dict(zip(*pair)) for pair in zip(best.indices.tolist(), best.values.tolist())]
        return tuple(given), tuple(alternatives)

    def _sampler(self, request: GenerateRequest) -> Sampler:
        from llmkit.sampling import Sampler

        room = self.context_length - len(request.prompt)
        return Sampler(request.sampling, request.prompt, eos_ids=self.eos_ids, room=room)

    # --- both

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both (B, T) int64, padded with id 0 on one side."""
        import torch

        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            ids[index, span] = torch.tensor(row)
            mask[index, span] = 1
        return ids.to(self.device), mask.to(self.device)

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        keep: Tensor | int,
        positions: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> Any:
        """The model's output, with logits at the kept positions only: an index (K,), or the last `keep`."""
        given: dict[str, Any] = {"use_cache": use_cache}
        if cache is not None:
            given["past_key_values"] = cache
        if positions is not None and "position_ids" in self._accepts:
            given["position_ids"] = positions
        if "logits_to_keep" in self._accepts:
            return self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, **given)
        out = self.model(input_ids=ids, attention_mask=mask, **given)
        out.logits = out.logits[:, -keep:] if isinstance(keep, int) else out.logits[:, keep]
        return out


def _pools(requests: Iterable[R], check: Callable[[R], None], size: Callable[[R], int]) -> Iterator[list[R]]:
    """Checked requests in lists of about POOL_TOKENS tokens."""
    pool: list[R] = []
    tokens = 0
    for request in requests:
        check(request)
        pool.append(request)
        tokens += size(request)
        if tokens >= POOL_TOKENS:
            yield pool
            pool, tokens = [], 0
    if pool:
        yield pool


def _positions(fed: Sequence[int], asking: Iterable[ScoreRequest]) -> set[int]:
    """The positions of `fed` whose logits are needed: those that predict a token asked about."""
    first = min(len(fed) - len(request.continuation) for request in asking)
    return set(range(first, len(fed)))


def _chunk(request_id: int, choice: Choice, reason: FinishReason | None, prompt: PromptLogprobs | None) -> Chunk:
    before = prompt or ((), ())
    if reason == "stop":
        return Chunk(request_id, (), (), (), "stop", *before)
    if choice.logprob is None or choice.top_logprobs is None:
        return Chunk(request_id, (choice.id,), (), (), reason, *before)
    return Chunk(request_id, (choice.id,), (choice.logprob,), (choice.top_logprobs,), reason, *before)


def _stored_dtype(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _context_length(config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(config, key, None), int):
            return length
    return UNBOUNDED_CONTEXT


def _cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values of a token, from the configuration; an estimate for unusual architectures."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize)


def _load(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """The model in evaluation mode, every parameter of it read from the checkpoint."""
    import torch
    import transformers

    from llmkit.architectures import register_architecture
    from llmkit.checkpoint import CheckpointError

    register_architecture(str(checkpoint.config.get("model_type")))
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in types:
        raise ValueError(f"engine 'transformers' computes in fp32 or bf16, not {dtype}")
    assert len(checkpoint.weights) > 0  # reads their headers: missing, damaged and pickled files are errors here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=types[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # else a report of many lines; they are an error below
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"transformers cannot load the checkpoint {checkpoint.path}: {first}") from error
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is damaged: tensor {name} has shape {list(found)} "
            f"where its config.json says {list(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"checkpoint {checkpoint.path} is incomplete: tensor {missing[0]}{more} is missing")
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # a device that this PyTorch does not know or have
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
