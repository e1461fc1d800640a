"""The recipe: learning rates as llm.c computes them, and options that complete each other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.gpt2 import shape_of_size
from llmkit.recipe import learning_rate_at, resolve
from llmkit.testing import tiny_data
from llmkit.trainer import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("recipe") / "data")


def config(**options) -> TrainConfig:
    defaults = {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "final_lr_fraction": 0.1}
    return TrainConfig(**{**defaults, **options})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    c = config(schedule=schedule)
    assert [learning_rate_at(step, c) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_schedules_at_known_points():
    """Values worked out by hand from llm.c's formulas."""
    assert learning_rate_at(55, config(schedule="cosine")) == pytest.approx(0.1 + 0.5 * 0.9)
    assert learning_rate_at(100, config(schedule="cosine")) == pytest.approx(0.1)
    assert learning_rate_at(55, config(schedule="linear")) == pytest.approx(0.55)
    assert learning_rate_at(99, config(schedule="constant")) == 1.0
    assert learning_rate_at(79, config(schedule="wsd")) == 1.0
    assert learning_rate_at(85, config(schedule="wsd")) == pytest.approx(0.1 + 0.5 * 0.9)  # 1 - sqrt(1/4)
    assert learning_rate_at(95, config(schedule="wsd")) == pytest.approx(0.1 + (1 - math.sqrt(0.75)) * 0.9)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 50),
    fraction=st.floats(0, 1),
)
def test_rates_stay_between_zero_and_the_peak_and_fall_after_the_warm_up(schedule, steps, warmup, fraction):
    c = config(schedule=schedule, steps=steps, warmup_steps=min(warmup, steps), final_lr_fraction=fraction)
    rates = [learning_rate_at(step, c) for step in range(steps)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[c.warmup_steps or 0 :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


@given(
    depth=st.integers(1, 12),
    sequence_length=st.sampled_from([None, 16, 64]),
    batch_size=st.sampled_from([None, 1, 3, 8]),
    steps=st.sampled_from([None, 1, 7, 5000]),
)
def test_depth_alone_is_complete_and_consistent(data, depth, sequence_length, batch_size, steps):
    options = TrainConfig(depth=depth, sequence_length=sequence_length, batch_size=batch_size, steps=steps)
    c: Any = resolve(options, data, None)
    for name, value in vars(c).items():
        assert value is not None or name in ("size", "dtype", "from_checkpoint"), name
    assert c.width % c.heads == 0
    assert c.total_batch_tokens % (c.batch_size * c.sequence_length) == 0
    assert 0 <= c.warmup_steps <= c.steps
    assert 1e-4 < c.learning_rate < 3e-3
    assert resolve(c, data, None) == c  # resolving is idempotent: a resumed run sees the same


def test_named_sizes():
    assert shape_of_size("gpt2") == shape_of_size("d12") == shape_of_size("gpt2:d12") == (12, 768, 12)
    assert shape_of_size("gpt2-xl") == shape_of_size("d48") == (48, 1600, 25)
    assert shape_of_size("d8") == (8, 512, 8)
    assert shape_of_size("gpt3:c768") == (12, 768, 12)
    for bad in ("d", "d0", "dx", "gpt3:c5", "gpt4", "", "gpt2:"):
        with pytest.raises(ValueError, match="unknown size"):
            shape_of_size(bad)
