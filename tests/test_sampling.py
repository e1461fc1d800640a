"""Sampling: filters equal transformers' own, distributions are right, seeds repeat, penalties are as defined."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmkit.engine import Sampling
from llmkit.sampling import Sampler, choose, draw, filtered_probs

VOCAB = 12


def sampler(sampling: Sampling, prompt: tuple[int, ...] = (0,), eos: frozenset[int] = frozenset()) -> Sampler:
    return Sampler(sampling, prompt, eos_ids=eos, room=10_000)


def random_logits(rows: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 20),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)


@given(st.lists(samplings, min_size=1, max_size=5), st.integers(0, 10_000), st.sampled_from([2, 12, 3000]))
@settings(deadline=None, max_examples=100)
def test_filters_equal_those_of_transformers(rows: list[Sampling], seed: int, vocab: int) -> None:
    logits = random_logits(len(rows), vocab, seed)
    ours = filtered_probs(logits, rows)
    for row, s in enumerate(rows):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
        if s.top_k:
            warpers.append(TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            warpers.append(TopPLogitsWarper(s.top_p))
        if s.min_p:
            warpers.append(MinPLogitsWarper(s.min_p))
        expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits[row : row + 1].clone()).softmax(-1)[0]
        torch.testing.assert_close(ours[row] / ours[row].sum(), expected, atol=1e-6, rtol=1e-4)


def test_a_flat_distribution_is_sorted_whole() -> None:
    vocab = 5000  # more than the head that top_p looks at first
    probs = filtered_probs(torch.zeros(1, vocab), [Sampling(top_p=0.5)])
    assert int((probs > 0).sum()) == pytest.approx(vocab / 2, abs=1)


def test_ties_keep_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert filtered_probs(logits, [Sampling(top_k=2)])[0].nonzero().flatten().tolist() == [1, 2]
    assert choose(logits, [sampler(Sampling(temperature=0))])[0].id == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=6), Sampling(top_p=0.8, min_p=0.02)])
def test_frequencies_follow_the_distribution(sampling: Sampling) -> None:
    logits = random_logits(1, VOCAB, seed=5)
    probs = filtered_probs(logits, [sampling])[0].double()
    probs /= probs.sum()
    draws, state = 20_000, sampler(Sampling(seed=1))
    ids = draw(probs.repeat(draws, 1), [state.uniform() for _ in range(draws)])
    counts = torch.bincount(ids, minlength=VOCAB).double()
    assert counts[probs == 0].sum() == 0
    expected = probs * draws
    kept = expected >= 5  # where the chi-square approximation holds
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 40  # 0.9999 quantile with 11 degrees of freedom: 37.4


def test_the_ends_of_the_unit_interval_have_tokens() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).repeat(2, 1)
    assert draw(weights, [0.0, math.nextafter(1.0, 0.0)]).tolist() == [1, 3]


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    logits = random_logits(7, VOCAB, seed=2)
    together = choose(logits, [sampler(Sampling(seed=i)) for i in range(7)])
    alone = [choose(logits[i : i + 1], [sampler(Sampling(seed=i))])[0] for i in range(7)]
    assert [choice.id for choice in together] == [choice.id for choice in alone]


def test_without_a_seed_requests_differ() -> None:
    logits = torch.zeros(1, 1000)
    assert len({choose(logits, [sampler(Sampling())])[0].id for _ in range(8)}) > 1


def test_repetition_penalty_covers_prompt_and_output_once() -> None:
    state = sampler(Sampling(repetition_penalty=2.0), prompt=(1, 1))
    state.accept(2)
    state.accept(2)
    logits = torch.tensor([3.0, 4.0, -1.0, 5.0])
    state.adjust(logits)
    assert logits.tolist() == [3.0, 2.0, -2.0, 5.0]


def test_presence_and_frequency_penalties_cover_the_output_alone() -> None:
    state = sampler(Sampling(presence_penalty=0.5, frequency_penalty=1.0), prompt=(0, 1))
    for token in (1, 2, 2):
        state.accept(token)
    logits = torch.zeros(4)
    state.adjust(logits)
    assert logits.tolist() == [0.0, -1.5, -2.5, 0.0]


def test_bias_and_min_tokens() -> None:
    eos = frozenset([3])
    state = sampler(Sampling(temperature=0, logit_bias={3: 100.0, 2: 50.0}, min_tokens=1), eos=eos)
    logits = torch.zeros(1, 4)
    first = choose(logits, [state])[0].id
    assert first == 2  # the end token is likeliest, but not allowed yet
    assert state.accept(first) is None
    assert state.accept(choose(logits, [state])[0].id) == "stop"
    assert logits.eq(0).all(), "the model's logits were changed"


def test_end_tokens_and_limits() -> None:
    eos = frozenset([3])
    assert sampler(Sampling(), eos=eos).accept(3) == "stop"
    assert sampler(Sampling(ignore_eos=True), eos=eos).accept(3) is None
    assert sampler(Sampling(ignore_eos=True, stop_token_ids=(5,)), eos=eos).accept(5) == "stop"
    assert sampler(Sampling(max_tokens=1)).accept(0) == "length"
    assert Sampler(Sampling(max_tokens=9), (0,), eos_ids=eos, room=1).accept(0) == "length"


def test_logprobs_are_the_models_before_any_filter() -> None:
    logits = random_logits(2, VOCAB, seed=9)
    wanted = Sampling(temperature=0, logit_bias={4: 100.0}, logprobs=3)
    with_logprobs, without = choose(logits, [sampler(wanted), sampler(Sampling())])
    expected = logits[0].log_softmax(-1)
    assert with_logprobs.id == 4
    assert with_logprobs.logprob == pytest.approx(expected[4].item())
    assert list(with_logprobs.top_logprobs or {}) == expected.topk(3).indices.tolist()
    assert without.logprob is None


def test_parameters_out_of_range_are_named() -> None:
    for name, value in {
        "temperature": -1.0,
        "top_p": 0.0,
        "top_k": -1,
        "min_p": 1.5,
        "max_tokens": 0,
        "repetition_penalty": 0.0,
        "logprobs": -1,
        "logit_bias": {-1: 1.0},
        "stop_token_ids": (-1,),
        "min_tokens": 500,
    }.items():
        with pytest.raises(ValueError, match=name):
            Sampling(**{name: value})  # type: ignore[arg-type]


def test_frequencies_of_whole_steps() -> None:
    """Through `choose`, one random number a step: the same test with everything in place."""
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    state = sampler(Sampling(seed=0, max_tokens=10_000))
    counts = Counter(choose(logits, [state])[0].id for _ in range(4000))
    for token, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert counts[token] == pytest.approx(4000 * share, abs=4.5 * math.sqrt(4000 * share * (1 - share)))
