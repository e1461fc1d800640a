"""ModelSpec: what the compiled forward pass needs to know of an architecture, and where its tensors are.

A model is a token embedding, blocks of pre-norm attention and a feed-forward layer, a final norm and a head. A file in
`llmkit_engine.models` maps an architecture's config.json to this description; nothing else knows an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmkit.engine import UnsupportedModel

Norm = Literal["layer", "rms"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]

#: names in config.json -> ours
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Linear:
    """Tensors of a linear layer. Several `weights` are stacked along the outputs; `transposed`: stored as (in, out)."""

    weights: tuple[str, ...]
    outputs: tuple[int, ...]  # of each weight
    inputs: int
    biases: tuple[str, ...] = ()  # none, or one for each weight
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class NormNames:
    """Tensors of a norm, (width)."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Mixing:
    """Tensors of the factors with which a block's input and values are mixed; None where they are not.

    x becomes lambdas[0] (x + skip · output of the mirrored block) + lambdas[1] · normed embedding; values become
    (1 - value) v + value · those of block 0.
    """

    lambdas: str | None  # (2)
    value: str | None  # (1)
    skip: tuple[str, int, int] | None  # tensor, its length, index


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """Tensors of one block. `qkv` gives queries, keys and values, `up` the gate first where the block is gated.

    A norm without tensors is None.
    """

    norm1: NormNames | None
    qkv: Linear
    out: Linear
    norm2: NormNames | None
    up: Linear
    down: Linear
    mixing: Mixing | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model. `head` None: the token embedding is the head too."""

    vocab: int
    context: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm: Norm
    eps: float
    activation: Activation
    gated: bool
    rope: Mapping[str, Any] | None  # transformers' rope_parameters; None: learned positions or none
    blocks: tuple[BlockSpec, ...]
    embedding: str
    positions: str | None  # (context, width)
    final_norm: NormNames | None
    head: str | None
    base_prefix: str = ""  # names in files saved from the bare model lack it
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    qk_norm: bool = False  # RMS norm without parameters of queries and keys, before the rotation
    mixes: bool = False  # blocks have `mixing`, and the embedding is normed
    softcap: float = 0.0  # logits become softcap · tanh(logits / softcap); 0: they stay
    window: int | None = None  # how many tokens attention reaches back, the token's own included

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "width", "heads", "kv_heads", "head_dim", "ffn"):
            if getattr(self, name) < 1:
                raise UnsupportedModel(f"{name} is {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise UnsupportedModel(f"{self.heads} heads do not divide into {self.kv_heads} groups")


def activation_of(name: str) -> Activation:
    """Our name of an activation function in config.json. Raises UnsupportedModel."""
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"the activation function {name!r}")
    return ACTIVATIONS[name]


def require_usual(config: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel where a key of `usual` has another value in `config`; an absent or null key is usual."""
    for key, value in usual.items():
        if config.get(key) is not None and config[key] != value:
            raise UnsupportedModel(f"{key}={config[key]!r}")
