"""Engine `llmkit` computes what transformers computes in fp32: greedy tokens and log-likelihoods, on real models."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import GREEDY, assert_same_greedy, edit_config, prompts, tiny_llama, tokens_of

from llmkit.checkpoint import Checkpoint, CheckpointError
from llmkit.engine import Engine, GenerateRequest, Sampling, ScoreRequest, UnsupportedModel
from llmkit.engines import open_engine
from llmkit.testing.tiny import TEXT, tiny_checkpoint, tiny_data
from llmkit_engine.engine import EmbeddedEngine
from llmkit_engine.rope import frequencies, rope_parameters
from llmkit_transformers.engine import TransformersEngine


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_equal(
    checkpoint: Checkpoint,
    *,
    count: int = 20,
    longest: int = 30,
    tolerance: float = 1e-4,
    texts: list[tuple[int, ...]] | None = None,
) -> None:
    """Greedy tokens and log-likelihoods of both engines are equal, for random prompts or for texts."""
    with (
        EmbeddedEngine.open(checkpoint, dtype="fp32") as engine,
        TransformersEngine.open(checkpoint, dtype="fp32", device="cpu") as oracle,
    ):
        given = texts or prompts(engine.vocab_size, count, longest=longest)
        requests = [GenerateRequest(i, prompt, GREEDY) for i, prompt in enumerate(given)]
        found, expected = tokens_of(engine.generate(requests)), tokens_of(oracle.generate(requests))
        assert_same_greedy(engine, oracle, found, expected, given)
        scores = [ScoreRequest(i, prompt, tuple(expected[i])) for i, prompt in enumerate(given)]
        if texts:
            scores += [ScoreRequest(count + i, text[:5], text[5:]) for i, text in enumerate(texts)]
        else:
            scores += [ScoreRequest(count + i, prompt, given[i - 1]) for i, prompt in enumerate(given)]
        ours = {result.id: result for result in engine.score(scores)}
        for theirs in oracle.score(scores):
            assert ours[theirs.id].logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


def test_stories260k_gives_transformers_tokens_for_100_prompts(test_data: Path) -> None:
    assert_equal(Checkpoint.open(test_data / "models" / "stories260k-hf"), count=100)


def test_gpt2_gives_transformers_tokens_for_100_prompts(tmp_path: Path) -> None:
    assert_equal(tiny_checkpoint(tmp_path / "gpt2"), count=100)


def test_a_gpt2_trained_here_gives_transformers_tokens_for_100_prompts(
    tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Unlike random weights, trained ones make likely and unlikely tokens, and activations of very different sizes."""
    data = tiny_data(tmp_path / "data")
    sizes = {"depth": 3, "width": 96, "heads": 3, "sequence-length": 64, "total-batch-tokens": 2048, "batch-size": 32}
    options = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    rest = ["--steps", 120, "--learning-rate", 3e-3, "--sample-every", 0, "--dtype", "fp32"]
    run_cli("train", "--backend", "torch", "--data", data.path, "--out", tmp_path / "run", *options, *rest)
    checkpoint = Checkpoint.open(tmp_path / "run")
    ids = checkpoint.tokenizer.encode(TEXT)
    texts = [tuple(ids[at : at + 12 + at % 20]) for at in range(0, 7000, 70)]
    with EmbeddedEngine.open(checkpoint) as engine:
        scores = list(engine.score([ScoreRequest(i, text[:5], text[5:]) for i, text in enumerate(texts)]))
    lengths = sum(len(score.logprobs) for score in scores)
    assert sum(score.logprob for score in scores) / lengths > -1.0  # nats a byte: it has learnt the text
    assert_equal(checkpoint, count=100, texts=texts)


@pytest.mark.slow
def test_smollm2_gives_transformers_tokens_for_100_prompts(test_data: Path, smollm2_path: Path) -> None:
    checkpoint = Checkpoint.open(smollm2_path)
    ids = checkpoint.tokenizer.encode((test_data / "text" / "wikitext2" / "valid.txt").read_text("utf-8")[:20_000])
    assert_equal(checkpoint, count=100, texts=[tuple(ids[at : at + 20]) for at in range(0, 2000, 20)])


ROPES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
]
VARIANTS: list[dict[str, Any]] = [
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True},
    {"rms_norm_eps": 0.1},
    {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1, "num_attention_heads": 16},  # a group larger than a tile of queries
    {"hidden_size": 54, "intermediate_size": 77, "head_dim": 10},  # nothing is a whole number of vectors
]


@pytest.mark.parametrize("changes", [*ROPES, *VARIANTS], ids=lambda changes: "-".join(map(str, _flat(changes))))
def test_variants_of_llama(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_equal(tiny_llama(tmp_path / "llama", **changes), count=8, longest=40, tolerance=2e-4)


def _flat(changes: dict[str, Any]) -> list[Any]:
    return [v if not isinstance(v, dict) else v["rope_type"] for pair in changes.items() for v in pair]


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_frequencies_equal_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": kind,
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=1024, num_attention_heads=16, max_position_embeddings=65536, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    found, ours = frequencies(rope_parameters(config.to_dict()), 64)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert ours == pytest.approx(factor)


def test_older_names_of_rope_settings() -> None:
    old = {"max_position_embeddings": 64, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    found = rope_parameters(old)
    assert (found["rope_type"], found["rope_theta"], found["factor"]) == ("linear", 5e5, 2.0)


def test_gpt2_saved_without_its_prefix(tmp_path: Path) -> None:
    from llmkit.checkpoint import save_checkpoint

    whole = tiny_checkpoint(tmp_path / "whole")
    weights = {name.removeprefix("transformer."): array for name, array in whole.weights.items()}
    save_checkpoint(tmp_path / "bare", config=whole.config, weights=weights, tokenizer=whole.tokenizer, provenance={})
    requests = [GenerateRequest(i, prompt, GREEDY) for i, prompt in enumerate(prompts(200, 5))]
    with EmbeddedEngine.open(whole) as a, EmbeddedEngine.open(Checkpoint.open(tmp_path / "bare")) as b:
        assert tokens_of(a.generate(requests)) == tokens_of(b.generate(requests))


def test_bf16_weights_give_fp32_results_exactly(tmp_path: Path) -> None:
    """bf16 weights widen without loss, so asking for fp32 changes nothing."""
    checkpoint = tiny_llama(tmp_path / "llama", dtype="bf16")
    requests = [ScoreRequest(i, prompt, (5, 6)) for i, prompt in enumerate(prompts(200, 5))]
    with EmbeddedEngine.open(checkpoint, fp32_inputs=True) as a, EmbeddedEngine.open(checkpoint, dtype="fp32") as b:
        assert (a.dtype, b.dtype) == ("bf16", "fp32")
        assert {r.id: r for r in a.score(requests)} == {r.id: r for r in b.score(requests)}


def test_rounding_weights_to_bf16_and_int8_changes_little(tmp_path: Path) -> None:
    checkpoint = tiny_llama(tmp_path / "llama")
    requests = [ScoreRequest(i, prompt, prompt) for i, prompt in enumerate(prompts(200, 20, shortest=5))]

    def mean(**options: Any) -> float:
        with EmbeddedEngine.open(checkpoint, **options) as engine:
            results = list(engine.score(requests))
        return sum(r.logprob for r in results) / sum(len(r.logprobs) for r in results)

    exact = mean()
    assert abs(mean(dtype="bf16") - exact) < 0.02
    assert 0 < abs(mean(quantize="int8") - exact) < 0.05


def test_int8_is_its_rounded_weights(tmp_path: Path) -> None:
    """Scales of each output, symmetric: equal to an fp32 model whose matrices were rounded so."""
    from llmkit.checkpoint import save_checkpoint

    checkpoint = tiny_llama(tmp_path / "llama", tie_word_embeddings=False)
    rounded = {}
    for name, array in checkpoint.weights.items():
        if array.ndim == 2 and "embed" not in name:
            top = np.abs(array).max(axis=1, keepdims=True)
            array = np.rint(array * (np.float32(127) / top)) * (top / np.float32(127))
        rounded[name] = array
    save_checkpoint(tmp_path / "b", config=checkpoint.config, weights=rounded, tokenizer=None, provenance={})
    requests = [ScoreRequest(i, prompt, prompt) for i, prompt in enumerate(prompts(200, 5))]
    with (
        EmbeddedEngine.open(checkpoint, quantize="int8", fp32_inputs=True) as int8,
        EmbeddedEngine.open(Checkpoint.open(tmp_path / "b")) as exact,
    ):
        expected = {result.id: result for result in exact.score(requests)}
        for result in int8.score(requests):
            assert result.logprobs == pytest.approx(expected[result.id].logprobs, abs=1e-3)


def test_what_it_does_not_compute_goes_to_transformers_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = edit_config(tiny_checkpoint(tmp_path / "gpt2"), reorder_and_upcast_attn=True)
    with pytest.raises(UnsupportedModel, match="reorder_and_upcast_attn"):
        EmbeddedEngine.open(checkpoint)
    with open_engine(checkpoint, device="cpu") as engine:
        assert isinstance(engine, Engine) and engine.name == "transformers"
    assert "engine 'transformers' runs it instead" in capsys.readouterr().err


def test_missing_tensors_and_wrong_shapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        EmbeddedEngine.open(edit_config(tiny_llama(tmp_path / "a"), tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \[88, 48\]"):
        EmbeddedEngine.open(edit_config(tiny_llama(tmp_path / "b"), intermediate_size=90))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16"},
        {"quantize": "int4"},
        {"device": "cuda"},
        {"cache_bytes": 10},
        {"threads": 0},
        {"step_tokens": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EmbeddedEngine.open(tiny_checkpoint(tmp_path / "gpt2"), **options)


def test_where_nothing_can_be_compiled_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in (EmbeddedEngine.unavailable() or "")


def test_seeds_give_the_tokens_of_the_transformers_engine(tmp_path: Path) -> None:
    """One sampler's rules: filters, penalties and random numbers are those of llmkit.sampling."""
    checkpoint = tiny_checkpoint(tmp_path / "gpt2")
    kinds = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {7: 3.0, 9: -100.0}, "min_tokens": 4},
    ]
    requests = [
        GenerateRequest(i, prompt, Sampling(max_tokens=12, seed=i, **kinds[i % len(kinds)]))  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts(200, 35))
    ]
    with EmbeddedEngine.open(checkpoint) as a, TransformersEngine.open(checkpoint, device="cpu") as b:
        assert tokens_of(a.generate(requests)) == tokens_of(b.generate(requests))
