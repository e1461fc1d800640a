"""GPT-2's shape: configuration, named sizes, and the tables of its parameters in both layouts that we exchange.

Hugging Face's layout has one tensor a layer, with the matrices of the four linear layers as (in, out). llm.c's has one
array a kind, all layers stacked, as (out, in), in a fixed order, with the token embedding padded to a multiple of 128.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    from llmkit.checkpoint import Checkpoint

    Array = npt.NDArray[Any]

VOCAB_MULTIPLE = 128  # llm.c pads the vocabulary so that the classifier's tiles are whole

#: depth -> (width, heads) of the GPT-2 family, and the depths that llm.c adds to it
DEPTHS = {
    6: (384, 6),
    12: (768, 12),
    24: (1024, 16),
    36: (1280, 20),
    48: (1600, 25),
    60: (1920, 30),
    72: (2880, 30),
    84: (3456, 36),
}
#: name -> depth
SIZES = {"gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48}


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """Shape of a GPT-2: `context` positions (T), `vocab` ids (V), `depth` layers (L), `heads`, `width` channels (C)."""

    vocab: int
    context: int
    depth: int
    heads: int
    width: int

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "depth", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")

    @property
    def padded_vocab(self) -> int:
        """llm.c's Vp."""
        return math.ceil(self.vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def parameters(self) -> int:
        """Number of parameters, tied head counted once, vocabulary not padded."""
        c = self.width
        return self.vocab * c + self.context * c + self.depth * (12 * c * c + 13 * c) + 2 * c

    @property
    def matrix_parameters(self) -> int:
        """Parameters without the two embeddings: the N of scaling laws."""
        return self.parameters - (self.vocab + self.context) * self.width

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token as llm.c counts them: 6N + 6·L·C·T, N without the position embedding."""
        n = self.parameters - self.context * self.width
        return 6 * n + 6 * self.depth * self.width * sequence_length

    def to_hf(self, *, eot_id: int | None, bos_id: int | None = None) -> dict[str, Any]:
        """config.json for transformers' GPT2LMHeadModel."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab,
            "n_positions": self.context,
            "n_embd": self.width,
            "n_layer": self.depth,
            "n_head": self.heads,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": eot_id if bos_id is None else bos_id,
            "eos_token_id": eot_id,
            "dtype": "float32",
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """From config.json. Raises ValueError for another architecture or a GPT-2 variant that is not computed here."""
        if config.get("model_type") != "gpt2":
            raise ValueError(f"the checkpoint is a {config.get('model_type')!r} model, not GPT-2")
        variants = {
            "activation_function": "gelu_new",
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "add_cross_attention": False,
        }
        for key, usual in variants.items():
            if config.get(key, usual) != usual:
                raise ValueError(f"the checkpoint has {key}={config[key]!r}, but only {usual!r} is supported")
        if config.get("layer_norm_epsilon", 1e-5) != 1e-5:
            raise ValueError(f"the checkpoint has layer_norm_epsilon={config['layer_norm_epsilon']}, not 1e-5")
        if config.get("n_inner") not in (None, 4 * config["n_embd"]):
            raise ValueError(f"the checkpoint has n_inner={config['n_inner']}, but only 4 * n_embd is supported")
        return cls(config["vocab_size"], config["n_positions"], config["n_layer"], config["n_head"], config["n_embd"])


def shape_of_size(size: str) -> tuple[int, int, int]:
    """(depth, width, heads) of `gpt2`, `gpt2-xl`, `d12`, `gpt2:d12`, `gpt3:c768`, … Raises ValueError."""
    family, _, rest = size.rpartition(":")
    if size in SIZES:
        return (SIZES[size], *DEPTHS[SIZES[size]])
    if family in ("", "gpt2") and rest.startswith("d") and rest[1:].isdigit() and int(rest[1:]) > 0:
        depth = int(rest[1:])
        return (depth, *DEPTHS.get(depth, (64 * depth, depth)))
    if family == "gpt3" and rest.startswith("c") and rest[1:].isdigit() and int(rest[1:]) in GPT3:
        return GPT3[int(rest[1:])]
    raise ValueError(
        f"unknown size {size!r}: use d1, d2, … (d12 is GPT-2's), gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
        f"or gpt3:c with {', '.join(map(str, GPT3))}"
    )


#: width -> (depth, width, heads) of Table 2.1 of the GPT-3 paper (Brown et al. 2020), and llm.c's small ones
GPT3 = {
    384: (6, 384, 6),
    768: (12, 768, 12),
    1024: (24, 1024, 16),
    1536: (24, 1536, 16),
    2048: (24, 2048, 16),
    2560: (32, 2560, 32),
    4096: (32, 4096, 32),
    12288: (96, 12288, 96),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of the 16 kinds of parameter. `shape` names dimensions (Vp, T, C, 3C, 4C); `layered`: one for each layer."""

    name: str  # llm.c's
    hf: str  # Hugging Face's, with {} for the layer
    shape: tuple[str, ...]
    layered: bool = False
    transposed: bool = False  # (in, out) at Hugging Face


#: in llm.c's order
PARAMETERS = (
    Parameter("wte", "transformer.wte.weight", ("Vp", "C")),
    Parameter("wpe", "transformer.wpe.weight", ("T", "C")),
    Parameter("ln1w", "transformer.h.{}.ln_1.weight", ("C",), True),
    Parameter("ln1b", "transformer.h.{}.ln_1.bias", ("C",), True),
    Parameter("qkvw", "transformer.h.{}.attn.c_attn.weight", ("3C", "C"), True, True),
    Parameter("qkvb", "transformer.h.{}.attn.c_attn.bias", ("3C",), True),
    Parameter("attprojw", "transformer.h.{}.attn.c_proj.weight", ("C", "C"), True, True),
    Parameter("attprojb", "transformer.h.{}.attn.c_proj.bias", ("C",), True),
    Parameter("ln2w", "transformer.h.{}.ln_2.weight", ("C",), True),
    Parameter("ln2b", "transformer.h.{}.ln_2.bias", ("C",), True),
    Parameter("fcw", "transformer.h.{}.mlp.c_fc.weight", ("4C", "C"), True, True),
    Parameter("fcb", "transformer.h.{}.mlp.c_fc.bias", ("4C",), True),
    Parameter("fcprojw", "transformer.h.{}.mlp.c_proj.weight", ("C", "4C"), True, True),
    Parameter("fcprojb", "transformer.h.{}.mlp.c_proj.bias", ("C",), True),
    Parameter("lnfw", "transformer.ln_f.weight", ("C",)),
    Parameter("lnfb", "transformer.ln_f.bias", ("C",)),
)


def parameter_shape(parameter: Parameter, config: GPT2Config) -> tuple[int, ...]:
    """Shape of one layer's array in llm.c's layout."""
    c = config.width
    sizes = {"Vp": config.padded_vocab, "T": config.context, "C": c, "3C": 3 * c, "4C": 4 * c}
    return tuple(sizes[name] for name in parameter.shape)


def hf_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in PARAMETERS:
        shape = parameter_shape(parameter, config)
        if parameter.name == "wte":
            shape = (config.vocab, config.width)
        if parameter.transposed:
            shape = shape[::-1]
        for layer in range(config.depth if parameter.layered else 1):
            shapes[parameter.hf.format(layer)] = shape
    return shapes


def check_hf_weights(shapes: Mapping[str, tuple[int, ...]], config: GPT2Config) -> None:
    """Raise ValueError, naming the tensor, unless `shapes` are those of a GPT-2 of this configuration."""
    for name, shape in hf_shapes(config).items():
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing from the checkpoint's weights")
        if tuple(shapes[name]) != shape:
            raise ValueError(f"tensor {name} has shape {list(shapes[name])} where its config.json says {list(shape)}")


def hf_weights(checkpoint: Checkpoint) -> tuple[GPT2Config, dict[str, Array]]:
    """Configuration and fp32 weights of a GPT-2 checkpoint, under the names of `hf_shapes`.

    The hub's own GPT-2 has its names without `transformer.`, and buffers of masks; both are taken care of. Raises
    ValueError for another architecture, a missing tensor or a wrong shape.
    """
    config = GPT2Config.from_hf(checkpoint.config)
    names = {name if name.startswith("transformer.") else f"transformer.{name}": name for name in checkpoint.weights}
    check_hf_weights({full: checkpoint.weights.shapes[name] for full, name in names.items()}, config)
    return config, {full: checkpoint.weights[names[full]] for full in hf_shapes(config)}


def to_llmc(weights: Mapping[str, Array], config: GPT2Config) -> dict[str, Array]:
    """Hugging Face weights -> llm.c's 16 arrays (L first where layered), the vocabulary padded with zero rows."""
    import numpy as np

    arrays: dict[str, Array] = {}
    for parameter in PARAMETERS:
        layers = [np.asarray(weights[parameter.hf.format(i)]) for i in range(config.depth if parameter.layered else 1)]
        layers = [layer.T if parameter.transposed else layer for layer in layers]
        array = np.stack(layers) if parameter.layered else layers[0]
        if parameter.name == "wte":
            array = np.pad(array, ((0, config.padded_vocab - config.vocab), (0, 0)))
        arrays[parameter.name] = np.ascontiguousarray(array)
    return arrays


def from_llmc(arrays: Mapping[str, Array], config: GPT2Config) -> dict[str, Array]:
    """llm.c's 16 arrays -> Hugging Face weights, the padding of the vocabulary dropped."""
    import numpy as np

    weights: dict[str, Array] = {}
    for parameter in PARAMETERS:
        array = arrays[parameter.name]
        if parameter.name == "wte":
            array = array[: config.vocab]
        for layer in range(config.depth if parameter.layered else 1):
            part = array[layer] if parameter.layered else array
            weights[parameter.hf.format(layer)] = np.ascontiguousarray(part.T if parameter.transposed else part)
    return weights
