"""Llama (Touvron et al. 2023): rotary positions, RMSNorm, gated SiLU, grouped-query attention (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit_engine.rope import check_rope, rope_parameters
from llmkit_engine.spec import BlockSpec, Linear, ModelSpec, NormNames, activation_of

ARCHITECTURES = ("LlamaForCausalLM",)


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """From config.json. Raises UnsupportedModel for a variant that is not computed."""
    width, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    rope = rope_parameters(config)
    check_rope(rope)

    def linear(prefix: str, parts: Mapping[str, int], inputs: int, bias: bool) -> Linear:
        biases = tuple(f"{prefix}{name}.bias" for name in parts) if bias else ()
        return Linear(tuple(f"{prefix}{name}.weight" for name in parts), tuple(parts.values()), inputs, biases)

    def block(prefix: str) -> BlockSpec:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        heads_out = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        return BlockSpec(
            norm1=NormNames(f"{prefix}input_layernorm.weight"),
            qkv=linear(attention, heads_out, width, attention_bias),
            out=linear(attention, {"o_proj": width}, heads * head_dim, attention_bias),
            norm2=NormNames(f"{prefix}post_attention_layernorm.weight"),
            up=linear(mlp, {"gate_proj": ffn, "up_proj": ffn}, width, mlp_bias),
            down=linear(mlp, {"down_proj": width}, ffn, mlp_bias),
        )

    return ModelSpec(
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        norm="rms",
        eps=config.get("rms_norm_eps", 1e-6),
        activation=activation_of(config.get("hidden_act", "silu")),
        gated=True,
        rope=rope,
        blocks=tuple(block(f"model.layers.{i}.") for i in range(config["num_hidden_layers"])),
        embedding="model.embed_tokens.weight",
        positions=None,
        final_norm=NormNames("model.norm.weight"),
        head=None if config.get("tie_word_embeddings", False) else "lm_head.weight",
        base_prefix="model.",
    )
