"""The embedded engine computes the architecture as transformers does, every variant of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from speedrun_support import random_model, save  # noqa: E402

from llmkit.engine import Engine, GenerateRequest, Sampling, ScoreRequest, UnsupportedModel  # noqa: E402
from llmkit.engines import open_engine  # noqa: E402
from llmkit_engine.engine import EmbeddedEngine  # noqa: E402
from llmkit_transformers.engine import TransformersEngine  # noqa: E402

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 4},
    {"rotary": False},
    {"qk_norm": False},
    {"relu2": False},
    {"tie_word_embeddings": True},
    {"value_residual": False},
    {"embedding_shortcut": False},
    {"unet_skips": False},
    {"final_logit_softcapping": None},
    {"sliding_window": 2},
    {"sliding_window": 5},
    {"sliding_window": 17, "hidden_size": 72, "num_attention_heads": 3},
]


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (1, 2, 15, 16, 17, 40)
    return [tuple(torch.randint(0, 256, (size,), generator=generator).tolist()) for size in sizes]


def answers(engine: Engine) -> tuple[dict[int, list[int]], list[tuple[float, ...]]]:
    """Greedy tokens, and log-probabilities of one prompt after another."""
    greedy = Sampling(temperature=0, max_tokens=20, ignore_eos=True)
    tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts()))}
    for chunk in engine.generate(GenerateRequest(i, prompt, greedy) for i, prompt in enumerate(prompts())):
        tokens[chunk.id] += chunk.tokens
    scores = engine.score([ScoreRequest(i, prompt, prompts()[3]) for i, prompt in enumerate(prompts())])
    by_id = {result.id: result.logprobs for result in scores}
    return tokens, [by_id[i] for i in range(len(prompts()))]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_it_answers_as_transformers_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = save(random_model(**changes), tmp_path / "model")
    with EmbeddedEngine.open(checkpoint, dtype="fp32", threads=2) as engine:
        tokens, scores = answers(engine)
    with TransformersEngine.open(checkpoint, dtype="fp32", device="cpu") as oracle:
        expected_tokens, expected_scores = answers(oracle)
    assert tokens == expected_tokens
    for ours, theirs in zip(scores, expected_scores):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_it_is_the_default_engine_of_these_models(tmp_path: Path) -> None:
    with open_engine(save(random_model(), tmp_path / "model")) as engine:
        assert engine.name == "llmkit"


def test_value_embeddings_go_to_transformers_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(random_model(value_embeddings=True), tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="value_embeddings"):
        EmbeddedEngine.open(checkpoint)
    with open_engine(checkpoint, device=None) as engine:
        assert engine.name == "transformers"
    assert "value_embeddings" in capsys.readouterr().err
