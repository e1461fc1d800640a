"""Contract of engines."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.engine import Chunk, Engine, GenerateRequest, Sampling, ScoreRequest, ScoreResult
from llmkit.plugins import NAME
from llmkit.testing.tiny import tiny_checkpoint

GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


class EngineContract:
    """Give the fixture `engine_class`. Override `checkpoint` for an engine that cannot run a tiny GPT-2."""

    tolerance = 1e-4  # of a log-probability in nats

    @pytest.fixture
    def engine_class(self) -> type[Engine]:
        raise NotImplementedError("a subclass of EngineContract gives the fixture `engine_class`")

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Checkpoint:
        return tiny_checkpoint(tmp_path / "checkpoint")

    @pytest.fixture
    def engine(self, engine_class: type[Engine], checkpoint: Checkpoint) -> Iterator[Engine]:
        with engine_class.open(checkpoint, dtype="fp32") as engine:
            yield engine

    def test_has_a_name_and_a_summary(self, engine_class: type[Engine]) -> None:
        assert NAME.fullmatch(engine_class.name)
        assert engine_class.summary()

    def test_knows_its_limits(self, engine: Engine, checkpoint: Checkpoint) -> None:
        assert engine.vocab_size == checkpoint.config["vocab_size"]
        assert engine.context_length >= 16
        assert engine.eos_ids == checkpoint.eos_ids

    def test_every_request_is_answered_once(self, engine: Engine) -> None:
        requests = _score_requests(engine, 20)
        results = list(engine.score(iter(requests)))
        assert sorted(result.id for result in results) == [request.id for request in requests]
        lengths = {request.id: len(request.continuation) for request in requests}
        assert all(len(r.logprobs) == len(r.greedy) == lengths[r.id] for r in results)
        assert all(p <= self.tolerance for r in results for p in r.logprobs)

    def test_scores_obey_the_chain_rule(self, engine: Engine) -> None:
        context, a, b = (1, 2, 3), (4, 5), (6,)
        whole = _score(engine, context, a + b)
        assert whole.logprobs[:2] == pytest.approx(_score(engine, context, a).logprobs, abs=self.tolerance)
        assert whole.logprobs[2:] == pytest.approx(_score(engine, context + a, b).logprobs, abs=self.tolerance)

    def test_probabilities_sum_to_one(self, engine: Engine) -> None:
        import math

        requests = [ScoreRequest(i, (7, 8, 9), (i,)) for i in range(engine.vocab_size)]
        results = list(engine.score(requests))
        assert math.fsum(math.exp(result.logprob) for result in results) == pytest.approx(1, abs=1e-3)
        assert sum(result.is_greedy for result in results) == 1

    def test_scores_do_not_depend_on_neighbours(self, engine: Engine) -> None:
        requests = _score_requests(engine, 20)
        together = {result.id: result for result in engine.score(requests)}
        for request in requests:
            alone = next(iter(engine.score([request])))
            assert together[request.id].logprobs == pytest.approx(alone.logprobs, abs=self.tolerance)

    def test_greedy_tokens_are_the_ones_that_score_says(self, engine: Engine) -> None:
        tokens = _tokens(engine.generate([GenerateRequest(0, (1, 2, 3), GREEDY)]))[0]
        assert len(tokens) == 8
        assert _score(engine, (1, 2, 3), tuple(tokens)).is_greedy

    def test_generations_do_not_depend_on_neighbours(self, engine: Engine) -> None:
        requests = [GenerateRequest(i, r.context, GREEDY) for i, r in enumerate(_score_requests(engine, 8, room=9))]
        together = _tokens(engine.generate(requests))
        assert together == {r.id: _tokens(engine.generate([r]))[r.id] for r in requests}

    def test_each_generation_ends_once_and_last(self, engine: Engine) -> None:
        ended: set[int] = set()
        for chunk in engine.generate([GenerateRequest(i, (i + 1,), GREEDY) for i in range(5)]):
            assert chunk.id not in ended
            if chunk.finish_reason is not None:
                ended.add(chunk.id)
        assert ended == set(range(5))

    def test_a_seed_repeats_alone_and_in_company(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=8, seed=3, ignore_eos=True)
        alone = _tokens(engine.generate([GenerateRequest(0, (1, 2), sampling)]))[0]
        requests = [GenerateRequest(i, (1, 2), Sampling(max_tokens=8, seed=i, ignore_eos=True)) for i in range(6)]
        together = _tokens(engine.generate(requests))
        assert together[3] == alone
        assert len({tuple(tokens) for tokens in together.values()}) > 1

    def test_logprobs_come_when_asked_for_and_are_those_of_score(self, engine: Engine) -> None:
        asked = Sampling(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
        chunks = list(engine.generate([GenerateRequest(0, (1, 2, 3), asked)]))
        tokens = tuple(token for chunk in chunks for token in chunk.tokens)
        logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        assert logprobs == pytest.approx(_score(engine, (1, 2, 3), tokens).logprobs, abs=self.tolerance)
        chunks = list(engine.generate([GenerateRequest(0, (1, 2, 3), GREEDY)]))
        assert all(not chunk.logprobs and not chunk.top_logprobs for chunk in chunks)

    def test_logprobs_of_the_prompt_come_with_the_first_chunk_and_are_those_of_score(self, engine: Engine) -> None:
        prompt = (5, 1, 2, 3, 8, 9, 4)
        asked = replace(GREEDY, prompt_logprobs=3)
        requests = [
            GenerateRequest(0, prompt, asked),
            GenerateRequest(1, (4,), asked),
            GenerateRequest(2, prompt, GREEDY),
        ]
        if not engine.gives_prompt_logprobs:
            with pytest.raises(ValueError, match="request 0: prompt_logprobs"):
                list(engine.generate(requests))
            return
        chunks: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in engine.generate(requests):
            chunks[chunk.id].append(chunk)
        first = chunks[0][0]
        assert first.prompt_logprobs == pytest.approx(
            _score(engine, prompt[:1], prompt[1:]).logprobs, abs=self.tolerance
        )
        assert len(first.prompt_top_logprobs) == len(prompt) - 1
        for index, likeliest in enumerate(first.prompt_top_logprobs):
            assert len(likeliest) == 3 and sorted(likeliest.values(), reverse=True) == list(likeliest.values())
            top = next(iter(likeliest))
            scored = _score(engine, prompt[: index + 1], (top,))
            assert scored.is_greedy and likeliest[top] == pytest.approx(scored.logprob, abs=self.tolerance)
        for chunk in (*chunks[0][1:], *chunks[1], *chunks[2]):
            assert not chunk.prompt_logprobs and not chunk.prompt_top_logprobs

    def test_an_abandoned_generation_leaves_its_id_free(self, engine: Engine) -> None:
        abandoned = engine.generate([GenerateRequest(0, (1, 2, 3), GREEDY)])
        next(iter(abandoned))
        del abandoned
        assert len(_tokens(engine.generate([GenerateRequest(0, (1, 2, 3), GREEDY)]))[0]) == 8

    def test_min_tokens_holds_the_end_back(self, engine: Engine) -> None:
        eos = next(iter(engine.eos_ids))
        sampling = Sampling(max_tokens=8, temperature=0, min_tokens=4, logit_bias={eos: 1000.0})
        assert len(_tokens(engine.generate([GenerateRequest(0, (1, 2, 3), sampling)]))[0]) == 4

    def test_top_k_of_one_is_greedy(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=8, top_k=1, ignore_eos=True)
        sampled = _tokens(engine.generate([GenerateRequest(0, (1, 2, 3), sampling)]))[0]
        assert sampled == _tokens(engine.generate([GenerateRequest(0, (1, 2, 3), GREEDY)]))[0]

    def test_logit_bias_chooses_and_forbids(self, engine: Engine) -> None:
        wanted = Sampling(max_tokens=3, temperature=0, logit_bias={11: 1000.0}, ignore_eos=True)
        assert _tokens(engine.generate([GenerateRequest(0, (1, 2), wanted)]))[0] == [11, 11, 11]
        first = _tokens(engine.generate([GenerateRequest(0, (1, 2), GREEDY)]))[0][0]
        banned = Sampling(max_tokens=1, temperature=0, logit_bias={first: -1000.0}, ignore_eos=True)
        assert _tokens(engine.generate([GenerateRequest(0, (1, 2), banned)]))[0] != [first]

    def test_a_stop_token_ends_and_is_not_among_the_tokens(self, engine: Engine) -> None:
        tokens = _tokens(engine.generate([GenerateRequest(0, (1, 2, 3), GREEDY)]))[0]
        stop = tokens[4]
        sampling = Sampling(max_tokens=8, temperature=0, stop_token_ids=(stop,), ignore_eos=True)
        chunks = list(engine.generate([GenerateRequest(0, (1, 2, 3), sampling)]))
        assert chunks[-1].finish_reason == "stop"
        assert _tokens(chunks)[0] == tokens[: tokens.index(stop)]

    def test_the_context_ends_a_generation(self, engine: Engine) -> None:
        prompt = tuple(1 + i % 50 for i in range(engine.context_length - 3))
        sampling = Sampling(max_tokens=50, temperature=0, ignore_eos=True)
        chunks = list(engine.generate([GenerateRequest(0, prompt, sampling)]))
        assert chunks[-1].finish_reason == "length"
        assert 3 <= len(_tokens(chunks)[0]) <= 4  # the last token need not be fed

    def test_cancelling_ends_one_request_only(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
        reasons: dict[int, str] = {}
        engine.cancel(99)  # unknown: nothing happens
        for chunk in engine.generate([GenerateRequest(i, (i + 1,), sampling) for i in range(3)]):
            if chunk.id == 1 and chunk.finish_reason is None:
                engine.cancel(1)
            if chunk.finish_reason is not None:
                reasons[chunk.id] = chunk.finish_reason
        assert reasons == {0: "length", 1: "cancelled", 2: "length"}

    @pytest.mark.parametrize(
        "request_",
        [GenerateRequest(5, (), GREEDY), GenerateRequest(5, (-1,), GREEDY), GenerateRequest(5, (10**6,), GREEDY)],
    )
    def test_a_bad_prompt_is_refused_by_name(self, engine: Engine, request_: GenerateRequest) -> None:
        with pytest.raises(ValueError, match="request 5"):
            list(engine.generate([request_]))

    def test_a_bad_score_request_is_refused_by_name(self, engine: Engine) -> None:
        too_long = tuple([1] * (engine.context_length + 1))
        for context, continuation in (((), (1,)), ((1,), ()), ((1,), (10**6,)), (too_long, (1,))):
            with pytest.raises(ValueError, match="request 5"):
                list(engine.score([ScoreRequest(5, context, continuation)]))


def _score_requests(engine: Engine, count: int, room: int = 0) -> list[ScoreRequest]:
    """Random requests of many lengths, some with a common beginning; `room` tokens of the context are left free."""
    rng = random.Random(0)
    limit = engine.context_length - room - 6
    shared = tuple(rng.randrange(1, engine.vocab_size) for _ in range(limit // 2))
    requests = []
    for index in range(count):
        own = tuple(rng.randrange(1, engine.vocab_size) for _ in range(rng.randint(1, limit // 2)))
        continuation = tuple(rng.randrange(engine.vocab_size) for _ in range(rng.randint(1, 5)))
        requests.append(ScoreRequest(index, shared + own if index % 3 == 0 else own, continuation))
    return requests


def _score(engine: Engine, context: tuple[int, ...], continuation: tuple[int, ...]) -> ScoreResult:
    return next(iter(engine.score([ScoreRequest(0, context, continuation)])))


def _tokens(chunks: Iterable[Chunk]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for chunk in chunks:
        tokens[chunk.id].extend(chunk.tokens)
    return dict(tokens)
