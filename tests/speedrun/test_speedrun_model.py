"""The architecture: against a plain restatement of it, in transformers and in the embedded engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from speedrun_support import random_model, save, training  # noqa: E402

from llmkit_speedrun.config import FEATURES  # noqa: E402

ABLATIONS: list[dict[str, Any]] = [
    {},
    {"rotary": False},
    {"qk_norm": False},
    {"relu2": False},
    {"tie_word_embeddings": True},
    {"value_residual": False},
    {"embedding_shortcut": False},
    {"unet_skips": False},
    {"final_logit_softcapping": None},
    {"value_embeddings": True},
    {"sliding_window": 5},
    {"num_hidden_layers": 4},
]


def ids_of(rows: int, length: int, vocab: int = 256, seed: int = 0) -> Any:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def restated(weights: dict[str, Any], config: Any, ids: list[int]) -> Any:
    """Logits (T, V) of one sequence in float64: loops over layers, positions and heads, no library attention."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, size, depth = config.num_attention_heads, config.head_dim, config.num_hidden_layers

    def norm(x: Any) -> Any:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps)

    def rotated(vector: Any, position: int) -> Any:
        out = vector.clone()
        for i in range(size // 2):
            angle = position * config.rope_theta ** (-2 * i / size)
            a, b = vector[i], vector[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = x0 = norm(w["model.embed_tokens.weight"][ids])
    first_values, stack = None, list[Any]()
    for layer in range(depth):
        p = f"model.layers.{layer}."
        if config.unet_skips and layer >= depth - depth // 2:
            x = x + w["model.skip_weights"][layer - (depth - depth // 2)] * stack.pop()
        if config.embedding_shortcut:
            x = w[p + "lambdas"][0] * x + w[p + "lambdas"][1] * x0
        h = norm(x)
        q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        if f"{p}self_attn.value_embedding.weight" in w:
            gate = 2 * torch.sigmoid(h[:, :32] @ w[f"{p}self_attn.value_gate.weight"].T)
            v = v + gate.repeat_interleave(size, dim=1) * w[f"{p}self_attn.value_embedding.weight"][ids]
        first_values = v if first_values is None else first_values
        if config.value_residual:
            mix = w[p + "self_attn.value_lambda"]
            v = (1 - mix) * v + mix * first_values
        y = torch.zeros_like(h)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            queries, keys = q[:, part], k[:, part]
            if config.qk_norm:
                queries, keys = norm(queries), norm(keys)
            if config.rotary:
                queries = torch.stack([rotated(row, t) for t, row in enumerate(queries)])
                keys = torch.stack([rotated(row, t) for t, row in enumerate(keys)])
            for t in range(len(ids)):
                begin = 0 if config.sliding_window is None else max(0, t + 1 - config.sliding_window)
                weights_of = torch.softmax(keys[begin : t + 1] @ queries[t] / math.sqrt(size), dim=0)
                y[t, part] = weights_of @ v[begin : t + 1, part]
        x = x + y @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x) @ w[p + "mlp.up_proj.weight"].T
        h = torch.relu(h) ** 2 if config.relu2 else torch.nn.functional.gelu(h, approximate="tanh")
        x = x + h @ w[p + "mlp.down_proj.weight"].T
        if layer < depth // 2:
            stack.append(x)
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = norm(x) @ head.T
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_the_logits_are_those_of_the_architecture(changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    ids = ids_of(1, 11)
    expected = restated(dict(model.state_dict()), model.config, ids[0].tolist())
    with torch.inference_mode():
        found = model(ids).logits[0].double()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"value_embeddings": True}], ids=str)
def test_a_cache_changes_nothing(changes: dict[str, Any]) -> None:
    """Generating token by token, padded on the left or not, takes the tokens that whole passes would."""
    model = random_model(**changes)
    ids = ids_of(2, 9)
    with torch.inference_mode():
        whole = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        again = model(whole).logits[:, 8:-1].argmax(-1)
        assert torch.equal(again, whole[:, 9:])
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
        beside = model.generate(
            padded, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(beside[:, 12:], whole[:, 9:])


def test_attention_written_out_is_the_same() -> None:
    model = random_model(sliding_window=6)
    ids = ids_of(2, 20)
    with torch.inference_mode():
        fast = model(ids).logits
        model.config._attn_implementation = "eager"
        torch.testing.assert_close(model(ids).logits, fast, atol=1e-4, rtol=1e-4)


def test_a_new_model_predicts_every_token_alike_and_begins_as_the_record_does() -> None:
    from llmkit_speedrun.model import SpeedrunConfig, SpeedrunForCausalLM

    torch.manual_seed(0)
    model = SpeedrunForCausalLM(
        SpeedrunConfig(vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
    )
    assert model(ids_of(1, 8)).logits.abs().max() == 0
    state = model.state_dict()
    for name, tensor in state.items():
        if "o_proj" in name or "down_proj" in name or name == "lm_head.weight":
            assert tensor.abs().max() == 0, name
        elif "lambdas" in name:
            assert tensor.tolist() == [1.0, 0.0]
        elif "value_lambda" in name:
            assert tensor.tolist() == [0.5]
        elif "skip" in name:
            assert tensor.tolist() == [1.0, 1.0]
        elif "embed_tokens" in name:
            assert 0.95 < tensor.std() < 1.05
        else:
            assert 0.9 < tensor.std() * (3 * tensor.shape[1]) ** 0.5 < 1.1, name


def test_transformers_opens_a_checkpoint_by_its_auto_classes(tmp_path: Path) -> None:
    """In a process that imports nothing of ours but the model's module."""
    import subprocess
    import sys

    model = random_model(sliding_window=7)
    checkpoint = save(model, tmp_path / "model")
    ids = ids_of(2, 20)
    with torch.inference_mode():
        expected = model(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch, transformers, llmkit_speedrun.model\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "ids = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(model(ids).logits.detach(), sys.argv[3])\n"
    )
    paths = (checkpoint.path, tmp_path / "ids.pt", tmp_path / "logits.pt")
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(paths[2], weights_only=True), expected, atol=1e-5, rtol=1e-5)


def test_the_trainer_computes_what_the_checkpoint_computes(tmp_path: Path) -> None:
    """The loss of the training step on one document is that of the saved model in transformers."""
    run = training(tmp_path, window=9)
    for _ in range(4):
        run.train_step()
    config, weights = run.to_hf()
    from llmkit_speedrun.model import SpeedrunConfig, SpeedrunForCausalLM

    saved = SpeedrunForCausalLM(SpeedrunConfig(**config)).eval()
    saved.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    ids = ids_of(1, 33, vocab=200)
    with torch.inference_mode():
        ours, theirs = run.validation_loss(ids[:, :-1], ids[:, 1:]), saved(ids, labels=ids).loss
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_every_feature_can_be_switched_off(tmp_path: Path) -> None:
    """And then training goes another way. (The mask has a test of its own.)"""
    losses = {}
    for feature in ("", *(name for name in FEATURES if name != "document-mask")):
        run = training(tmp_path, without=feature)
        steps = [run.train_step().loss for _ in range(4)]
        losses[feature] = steps[-1]
    assert len(set(losses.values())) == len(losses), losses
