"""The speedrun's architecture: rotary positions, norms without parameters, ReLU^2, blocks mixed with each other.

See llmkit_speedrun/model.py, which it is trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit_engine.spec import BlockSpec, Linear, Mixing, ModelSpec, require_usual

ARCHITECTURES = ("SpeedrunForCausalLM",)


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """From config.json. Raises UnsupportedModel for a variant that is not computed."""
    require_usual(config, {"value_embeddings": False})
    width, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    context, depth = config["max_position_embeddings"], config["num_hidden_layers"]
    half = depth // 2

    def linear(names: tuple[str, ...], inputs: int, outputs: int) -> Linear:
        return Linear(tuple(f"{name}.weight" for name in names), (outputs,) * len(names), inputs)

    def block(i: int) -> BlockSpec:
        prefix = f"model.layers.{i}."
        attention = f"{prefix}self_attn."
        skips = config["unet_skips"] and i >= depth - half
        return BlockSpec(
            norm1=None,
            qkv=linear(tuple(f"{attention}{name}_proj" for name in "qkv"), width, width),
            out=linear((f"{attention}o_proj",), width, width),
            norm2=None,
            up=linear((f"{prefix}mlp.up_proj",), width, ffn),
            down=linear((f"{prefix}mlp.down_proj",), ffn, width),
            mixing=Mixing(
                lambdas=f"{prefix}lambdas" if config["embedding_shortcut"] else None,
                value=f"{attention}value_lambda" if config["value_residual"] else None,
                skip=("model.skip_weights", half, i - (depth - half)) if skips else None,
            ),
        )

    return ModelSpec(
        vocab=config["vocab_size"],
        context=context,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=ffn,
        norm="rms",
        eps=config["rms_norm_eps"],
        activation="relu2" if config["relu2"] else "gelu_tanh",
        gated=False,
        rope={"rope_type": "default", "rope_theta": config["rope_theta"]} if config["rotary"] else None,
        blocks=tuple(block(i) for i in range(depth)),
        embedding="model.embed_tokens.weight",
        positions=None,
        final_norm=None,
        head=None if config["tie_word_embeddings"] else "lm_head.weight",
        base_prefix="model.",
        qk_norm=config["qk_norm"],
        mixes=True,
        softcap=config["final_logit_softcapping"] or 0.0,
        window=config["sliding_window"],
    )
