"""What the tests of the engine share: checkpoints, prompts, the oracle's answers."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.checkpoint import Checkpoint, save_checkpoint
from llmkit.engine import Chunk, Engine, Sampling
from llmkit.tokenizer import load_tokenizer
from llmkit_engine.models import describe
from llmkit_engine.spec import Linear

GREEDY = Sampling(temperature=0, max_tokens=16, ignore_eos=True)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def tiny_llama(path: Path, *, dtype: str = "fp32", seed: int = 0, **changes: Any) -> Checkpoint:
    """Write a small Llama with random weights and the byte tokenizer; `changes` to its config.json."""
    tokenizer = load_tokenizer("byte")
    config = {**LLAMA, "vocab_size": tokenizer.vocab_size, **changes}
    spec = describe("LlamaForCausalLM", config)
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray[Any, Any]] = {}

    def add(linear: Linear) -> None:
        for name, outputs in zip(linear.weights, linear.outputs):
            weights[name] = rng.normal(0, 1.2 / math.sqrt(linear.inputs), (outputs, linear.inputs)).astype(np.float32)
        for name, outputs in zip(linear.biases, linear.outputs):
            weights[name] = rng.normal(0, 0.1, outputs).astype(np.float32)

    for block in spec.blocks:
        for linear in (block.qkv, block.out, block.up, block.down):
            add(linear)
        for norm in (block.norm1, block.norm2):
            assert norm is not None
            weights[norm.weight] = rng.uniform(0.5, 1.5, spec.width).astype(np.float32)
    assert spec.final_norm is not None
    weights[spec.final_norm.weight] = rng.uniform(0.5, 1.5, spec.width).astype(np.float32)
    add(Linear((spec.embedding,), (spec.vocab,), spec.width))
    if spec.head:
        add(Linear((spec.head,), (spec.vocab,), spec.width))
    save_checkpoint(path, config=config, weights=weights, tokenizer=tokenizer, provenance={}, dtype=dtype)
    return Checkpoint.open(path)


def edit_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """The checkpoint with a changed config.json."""
    (checkpoint.path / "config.json").write_text(json.dumps({**checkpoint.config, **changes}))
    return Checkpoint.open(checkpoint.path)


def prompts(vocab: int, count: int, *, seed: int = 0, shortest: int = 1, longest: int = 30) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocab) for _ in range(rng.randint(shortest, longest))) for _ in range(count)]


def tokens_of(chunks: Iterable[Chunk]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for chunk in chunks:
        tokens[chunk.id] += chunk.tokens
    return dict(tokens)


def assert_same_greedy(
    engine: Engine,
    oracle: Engine,
    found: dict[int, list[int]],
    expected: dict[int, list[int]],
    given: Sequence[tuple[int, ...]],
) -> None:
    """Tokens are equal; where they part, the two were tied: their log-probabilities within 1e-3 under the oracle."""
    from llmkit.engine import ScoreRequest

    for index, prompt in enumerate(given):
        ours, theirs = found[index], expected[index]
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        context = (*prompt, *theirs[:at])
        pair = [ScoreRequest(i, context, (token,)) for i, token in enumerate((ours[at], theirs[at]))]
        scores = [result.logprob for result in oracle.score(pair)]
        assert abs(scores[0] - scores[1]) < 1e-3, f"prompt {index} parts at token {at} without a tie"
