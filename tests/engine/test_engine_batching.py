"""Continuous batching: results are the same bits whatever happens around a request, and nothing leaks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_support import GREEDY, prompts, tiny_llama, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.checkpoint import Checkpoint
from llmkit.engine import GenerateRequest, Sampling, ScoreRequest
from llmkit.generation import TextGenerator, TextRequest
from llmkit.testing.tiny import tiny_checkpoint
from llmkit_engine.aio import AsyncEngine
from llmkit_engine.engine import EmbeddedEngine
from llmkit_engine.runner import block_floats

EXAMPLES = settings(max_examples=25)
VOCAB = 200


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("batching") / "model"
    return tiny_checkpoint(folder, context=96) if request.param == "gpt2" else tiny_llama(folder)


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine.open(checkpoint, threads=1) as engine:
        yield engine


def block_bytes(engine: EmbeddedEngine) -> int:
    spec = engine.scheduler.runner.spec
    return 4 * block_floats(spec) * len(spec.blocks)


def used(engine: EmbeddedEngine) -> int:
    return engine.scheduler.blocks.used


PROMPT = st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 5))  # shared stem, its length, own tokens


def prompt_of(parts: tuple[int, int, int]) -> tuple[int, ...]:
    stem, length, own = parts
    rng = random.Random(stem)
    shared = [rng.randrange(3, VOCAB) for _ in range(60)]
    return (*shared[:length], *range(10 + stem, 10 + stem + own))


@EXAMPLES
@given(
    parts=st.lists(PROMPT, min_size=1, max_size=12),
    step_tokens=st.integers(1, 64),
    max_running=st.integers(1, 8),
    blocks=st.integers(6, 16),
    threads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_generations_are_the_same_bits_in_any_company(
    checkpoint: Checkpoint,
    alone: EmbeddedEngine,
    parts: list[tuple[int, int, int]],
    step_tokens: int,
    max_running: int,
    blocks: int,
    threads: int,
    seed: int,
) -> None:
    """Chunked prompts, cache hits, pre-emption (few blocks), neighbours and threads; log-probabilities bit for bit."""
    options: dict[str, Any] = {"step_tokens": step_tokens, "max_running": max_running, "threads": threads}
    sampled = Sampling(max_tokens=20, seed=seed, top_p=0.9, logprobs=2, ignore_eos=True)
    sampling = [GREEDY, sampled, replace(sampled, prompt_logprobs=1)]
    requests = [GenerateRequest(i, prompt_of(p), sampling[i % 3]) for i, p in enumerate(parts)]
    with EmbeddedEngine.open(checkpoint, cache_bytes=blocks * block_bytes(alone), **options) as engine:
        assert engine.scheduler.runner.cache.nbytes <= blocks * block_bytes(alone)
        chunks = list(engine.generate(requests))
        assert used(engine) == 0 and not engine.scheduler.busy
    for request in requests:
        alone.scheduler.blocks.clear()
        expected = list(alone.generate([request]))
        assert [chunk for chunk in chunks if chunk.id == request.id] == expected


@EXAMPLES
@given(
    parts=st.lists(st.tuples(PROMPT, st.integers(1, 4)), min_size=1, max_size=16),
    step_tokens=st.integers(1, 64),
    blocks=st.integers(6, 24),
)
def test_scores_are_the_same_bits_in_any_company(
    checkpoint: Checkpoint,
    alone: EmbeddedEngine,
    parts: list[tuple[tuple[int, int, int], int]],
    step_tokens: int,
    blocks: int,
) -> None:
    requests = [ScoreRequest(i, prompt_of(p), (7, 9, i + 3, 4)[:n]) for i, (p, n) in enumerate(parts)]
    with EmbeddedEngine.open(checkpoint, cache_bytes=blocks * block_bytes(alone), step_tokens=step_tokens) as engine:
        results = {result.id: result for result in engine.score(requests)}
        assert used(engine) == 0
    assert len(results) == len(requests)
    for request in requests:
        alone.scheduler.blocks.clear()
        assert results[request.id] == next(iter(alone.score([request])))


def test_preemption_happens_and_changes_nothing(checkpoint: Checkpoint, alone: EmbeddedEngine) -> None:
    requests = [
        GenerateRequest(i, prompt, Sampling(temperature=0, max_tokens=40, ignore_eos=True))
        for i, prompt in enumerate(prompts(VOCAB, 8, shortest=20))
    ]
    with EmbeddedEngine.open(checkpoint, cache_bytes=10 * block_bytes(alone)) as engine:
        found = tokens_of(engine.generate(requests))
        assert engine.scheduler.preemptions > 0
    assert found == tokens_of(alone.generate(requests))


def test_scoring_and_generating_share_a_full_cache(checkpoint: Checkpoint, alone: EmbeddedEngine) -> None:
    """Each takes the blocks that the other holds while its consumer does something else."""
    generations = [GenerateRequest(i, p, GREEDY) for i, p in enumerate(prompts(VOCAB, 3, shortest=40, longest=60))]
    scores = [ScoreRequest(i, p, (5, 6)) for i, p in enumerate(prompts(VOCAB, 9, seed=1, shortest=40, longest=60))]
    with EmbeddedEngine.open(checkpoint, cache_bytes=6 * block_bytes(alone), step_tokens=16) as engine:
        chunks, results = engine.generate(generations), engine.score(scores)
        first, scored_first = [next(chunks)], [next(results)]
        first.append(next(chunks))
        scored_first.append(next(results))
        found = tokens_of([*first, *chunks])
        scored = {result.id: result for result in [*scored_first, *results]}
        assert used(engine) == 0
    assert found == tokens_of(alone.generate(generations))
    assert scored == {result.id: result for result in alone.score(scores)}


def test_a_shared_prefix_is_computed_once(checkpoint: Checkpoint) -> None:
    stem = prompts(VOCAB, 1, shortest=64, longest=64)[0]
    with EmbeddedEngine.open(checkpoint) as engine:
        list(engine.generate([GenerateRequest(i, (*stem, i + 3), Sampling(max_tokens=1, seed=1)) for i in range(20)]))
        assert engine.scheduler.computed_tokens == 64 + 20
        list(engine.generate([GenerateRequest(0, (*stem, 99), Sampling(max_tokens=1, seed=1))]))
        assert engine.scheduler.computed_tokens == 64 + 20 + 1


def test_samples_of_one_prompt_share_its_blocks(checkpoint: Checkpoint) -> None:
    prompt = prompts(VOCAB, 1, shortest=70, longest=70)[0]
    sampling = Sampling(max_tokens=2, seed=1, ignore_eos=True, prompt_logprobs=0)
    with EmbeddedEngine.open(checkpoint) as engine:
        pieces = TextGenerator(engine, checkpoint.tokenizer).stream([TextRequest(0, prompt, sampling, n=8)])
        first = next(pieces)
        while len(first.chunk.prompt_logprobs) == 0:
            first = next(pieces)
        assert first.sample == 0 and len(first.chunk.prompt_logprobs) == 69
        assert all(not piece.chunk.prompt_logprobs for piece in pieces)
        # 64 tokens fill blocks; each sample computes the 6 that follow, and one token to go on from.
        assert engine.scheduler.computed_tokens == 64 + 8 * 7


def test_rows_of_logits_bound_a_step_with_prompt_logprobs(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than a step's rows, beside requests that decode."""
    monkeypatch.setattr("llmkit_engine.engine.STEP_ROWS", 16)
    checkpoint = Checkpoint.open(test_data / "models" / "stories260k-hf")
    long = prompts(500, 1, shortest=120, longest=120)[0]
    asked = replace(GREEDY, prompt_logprobs=0)
    with EmbeddedEngine.open(checkpoint) as engine:
        requests = [GenerateRequest(i, (5, i + 3), GREEDY) for i in range(10)] + [GenerateRequest(10, long, asked)]
        chunks = list(engine.generate(requests))
        assert tokens_of(chunks) == {r.id: tokens_of(engine.generate([r]))[r.id] for r in requests}
        given = next(chunk.prompt_logprobs for chunk in chunks if chunk.id == 10)
        assert given == next(engine.score([ScoreRequest(0, long[:1], long[1:])])).logprobs


def test_mmlu_shaped_scores_compute_each_unique_token_once(test_data: Path) -> None:
    """Subjects with five shared shots, questions with four one-token answers; the unique tokens are counted apart."""
    rng = random.Random(0)
    requests: list[ScoreRequest] = []
    tokens: set[tuple[int, ...]] = set()
    for _ in range(3):
        shots = tuple(rng.randrange(3, 500) for _ in range(300))
        for _ in range(20):
            context = (*shots, *(rng.randrange(3, 500) for _ in range(rng.randint(20, 100))))
            tokens |= {context[: n + 1] for n in range(len(context))}
            requests += [ScoreRequest(len(requests) + i, context, (answer,)) for i, answer in enumerate((5, 6, 7, 8))]
    rng.shuffle(requests)
    with EmbeddedEngine.open(Checkpoint.open(test_data / "models" / "stories260k-hf")) as engine:
        assert len(list(engine.score(requests))) == len(requests)
        assert engine.scheduler.computed_tokens == len(tokens)


def test_results_stream(checkpoint: Checkpoint) -> None:
    """Requests are read as they are needed, and the first results come before the last request is read."""
    read = 0

    def endless() -> Iterator[GenerateRequest]:
        nonlocal read
        while True:
            yield GenerateRequest(read, (5, 6, 7), GREEDY)
            read += 1

    with EmbeddedEngine.open(checkpoint, max_running=4) as engine:
        stream = engine.generate(endless())
        finished = 0
        while finished < 20:
            finished += next(stream).finish_reason is not None
        assert read <= 20 + 2 * 4 + 1
        stream.close()  # type: ignore[attr-defined]
        assert used(engine) == 0 and not engine.scheduler.busy


def test_ten_thousand_requests_with_cancellations_leak_nothing(checkpoint: Checkpoint) -> None:
    rng = random.Random(0)
    stems = prompts(VOCAB, 6, shortest=10, longest=60)

    def requests() -> Iterator[GenerateRequest]:
        for i in range(10_000):
            stem = rng.choice(stems)
            sampling = Sampling(max_tokens=rng.randint(1, 4), seed=i, ignore_eos=True)
            yield GenerateRequest(i, (*stem[: rng.randint(1, len(stem))], rng.randrange(3, VOCAB)), sampling)

    reasons: dict[int, str] = {}
    with EmbeddedEngine.open(checkpoint, cache_bytes=2**20, max_running=64) as engine:
        limit = engine.scheduler.blocks.count
        for chunk in engine.generate(requests()):
            if rng.random() < 0.2:
                engine.cancel(rng.randrange(max(0, chunk.id - 50), chunk.id + 50))
            if chunk.finish_reason is not None:
                assert chunk.id not in reasons
                reasons[chunk.id] = chunk.finish_reason
        assert len(reasons) == 10_000 and set(reasons.values()) == {"length", "cancelled"}
        assert used(engine) == 0 and engine.scheduler.blocks.available == limit
        assert not engine.scheduler.busy and engine.scheduler.running == 0


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.6}], ids=str)
def test_samples_follow_the_distribution(alone: EmbeddedEngine, filters: dict[str, Any]) -> None:
    """Chi-square of 4,000 first tokens against the probabilities that the filters leave."""
    count, prompt = 4000, (5, 9, 12)
    requests = [
        GenerateRequest(i, prompt, Sampling(max_tokens=1, seed=i, ignore_eos=True, **filters)) for i in range(count)
    ]
    drawn = np.bincount(
        [tokens[0] for tokens in tokens_of(alone.generate(requests)).values()], minlength=alone.vocab_size
    )
    scored = {r.id: r.logprob for r in alone.score([ScoreRequest(i, prompt, (i,)) for i in range(alone.vocab_size)])}
    probs = np.exp(np.array([scored[i] for i in range(alone.vocab_size)]) / filters.get("temperature", 1.0))
    probs /= probs.sum()
    order = np.argsort(-probs)
    keep = np.ones(len(probs), dtype=bool)
    if "top_k" in filters:
        keep[order[filters["top_k"] :]] = False
    if "top_p" in filters:
        keep[order[1 + np.searchsorted(np.cumsum(probs[order]), filters["top_p"]) :]] = False
    if "min_p" in filters:
        keep = probs >= filters["min_p"] * probs.max()
    expected = np.where(keep, probs, 0) / probs[keep].sum() * count
    assert drawn[~keep].sum() == 0
    large = expected >= 5
    observed = np.append(drawn[large], drawn[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5  # about one in 100,000 for a true sampler


def test_a_constraint_limits_tokens_and_its_failure_ends_its_request_only(checkpoint: Checkpoint) -> None:
    seen: list[tuple[int, ...]] = []

    def digits(tokens: tuple[int, ...]) -> np.ndarray[Any, Any]:
        seen.append(tokens)
        mask = np.zeros(vocab, dtype=bool)
        mask[48:58] = True
        return mask

    with EmbeddedEngine.open(checkpoint) as engine:
        vocab = engine.vocab_size
        found = tokens_of(
            engine.generate([GenerateRequest(0, (5, 6), GREEDY, digits), GenerateRequest(1, (5, 6), GREEDY)])
        )
        assert all(48 <= token < 58 for token in found[0]) and len(found[0]) == 16
        assert seen[3] == tuple(found[0][:3])
        assert found[1] == tokens_of(engine.generate([GenerateRequest(1, (5, 6), GREEDY)]))[1]
        for bad in (lambda _: np.zeros(vocab, dtype=bool), lambda _: np.ones(3, dtype=bool)):
            with pytest.raises(ValueError, match="request 4: constraint"):
                list(engine.generate([GenerateRequest(4, (5, 6), GREEDY, bad)]))
        assert used(engine) == 0


BAD: list[tuple[str, GenerateRequest]] = [
    ("prompt is empty", GenerateRequest(1, ())),
    ("token id 100000", GenerateRequest(1, (100_000,))),
    ("token id -1", GenerateRequest(1, (-1,))),
    ("leaves room", GenerateRequest(1, (5,) * 96)),
    ("logit_bias", GenerateRequest(1, (5,), Sampling(logit_bias={100_000: 1.0}))),
    ("stop_token_ids", GenerateRequest(1, (5,), Sampling(stop_token_ids=(100_000,)))),
]


@pytest.mark.parametrize(("message", "request_"), BAD, ids=[message for message, _ in BAD])
def test_bad_requests_are_named_and_others_go_on(
    checkpoint: Checkpoint, message: str, request_: GenerateRequest
) -> None:
    async def main() -> None:
        with EmbeddedEngine.open(checkpoint) as engine, AsyncEngine(engine) as streams:
            good = streams.stream(GenerateRequest(0, (5, 6), GREEDY))
            first = await anext(good)
            with pytest.raises(ValueError, match=message):
                await streams.generate(request_)
            rest = [chunk async for chunk in good]
            assert len(first.tokens) + sum(len(chunk.tokens) for chunk in rest) == 16

    asyncio.run(main())


def test_two_requests_in_flight_cannot_share_an_id(checkpoint: Checkpoint) -> None:
    with EmbeddedEngine.open(checkpoint) as engine:
        stream = engine.generate([GenerateRequest(0, (5, 6), GREEDY)])
        next(stream)
        with pytest.raises(ValueError, match="request 0: id is that of"):
            next(engine.generate([GenerateRequest(0, (5,))]))
        assert len(list(stream)) == 15


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"min_tokens": 200},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_parameters_out_of_range_are_named(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Sampling(**parameters)


def test_asyncio_streams_run_together_and_leaving_one_cancels_it(checkpoint: Checkpoint, alone: EmbeddedEngine) -> None:
    requests = [GenerateRequest(i, prompt, GREEDY) for i, prompt in enumerate(prompts(VOCAB, 20))]

    async def main() -> None:
        with EmbeddedEngine.open(checkpoint) as engine, AsyncEngine(engine) as streams:
            stream = streams.stream(GenerateRequest(99, (5, 6), Sampling(max_tokens=80, ignore_eos=True)))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            parts = await asyncio.gather(*(streams.generate(request) for request in requests))
            assert tokens_of(chunk for part in parts for chunk in part) == tokens_of(alone.generate(requests))
            while engine.scheduler.busy:
                await asyncio.sleep(0.01)
            assert used(engine) == 0

    asyncio.run(main())


def test_an_idle_engine_uses_no_processor_time(checkpoint: Checkpoint) -> None:
    async def main() -> None:
        with EmbeddedEngine.open(checkpoint) as engine, AsyncEngine(engine) as streams:
            await streams.generate(GenerateRequest(0, (5, 6), GREEDY))
            await asyncio.sleep(0.2)
            before = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - before < 0.1

    asyncio.run(main())
