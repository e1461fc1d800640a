"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, fused query-key-value, GELU; matrices are (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit_engine.spec import BlockSpec, Linear, ModelSpec, NormNames, activation_of, require_usual

ARCHITECTURES = ("GPT2LMHeadModel",)


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """From config.json. Raises UnsupportedModel for a variant that is not computed."""
    usual = {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "add_cross_attention": False}
    require_usual(config, usual)
    width, heads = config["n_embd"], config["n_head"]
    ffn = config.get("n_inner") or 4 * width
    return ModelSpec(
        vocab=config["vocab_size"],
        context=config["n_positions"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=ffn,
        norm="layer",
        eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation_of(config.get("activation_function", "gelu_new")),
        gated=False,
        rope=None,
        blocks=tuple(_block(f"transformer.h.{i}.", width, ffn) for i in range(config["n_layer"])),
        embedding="transformer.wte.weight",
        positions="transformer.wpe.weight",
        final_norm=NormNames("transformer.ln_f.weight", "transformer.ln_f.bias"),
        head=None if config.get("tie_word_embeddings", True) else "lm_head.weight",
        base_prefix="transformer.",
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
    )


def _block(prefix: str, width: int, ffn: int) -> BlockSpec:
    def linear(name: str, inputs: int, outputs: int) -> Linear:
        path = f"{prefix}{name}."
        return Linear((f"{path}weight",), (outputs,), inputs, (f"{path}bias",), transposed=True)

    return BlockSpec(
        norm1=NormNames(f"{prefix}ln_1.weight", f"{prefix}ln_1.bias"),
        qkv=linear("attn.c_attn", width, 3 * width),
        out=linear("attn.c_proj", width, width),
        norm2=NormNames(f"{prefix}ln_2.weight", f"{prefix}ln_2.bias"),
        up=linear("mlp.c_fc", width, ffn),
        down=linear("mlp.c_proj", ffn, width),
    )
