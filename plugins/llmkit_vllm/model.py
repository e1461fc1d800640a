"""What vLLM can run of our checkpoints, said before it is started, and in its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmkit.engine import UnsupportedModel
from llmkit_vllm.environment import has_gpu

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint

#: Sizes of an attention head that vLLM 0.32 has CPU kernels for. With another it starts, and dies at the first request
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
STORED = {"float32": "fp32", "bfloat16": "bf16"}
WIDTH, HEADS = ("hidden_size", "n_embd"), ("num_attention_heads", "n_head")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def one_model(checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    """The checkpoint that all names mean. Raises ValueError where they are several."""
    first, *others = checkpoints.values()
    if any(other is not first for other in others):
        raise ValueError("server 'vllm' serves one checkpoint; start it once for each, with --port")
    return first


def check_model(checkpoint: Checkpoint, *, text: bool) -> None:
    """Raise UnsupportedModel or CheckpointError for what vLLM would fail at late or unclearly. `text`: not ids only."""
    from llmkit.checkpoint import CheckpointError

    assert len(checkpoint.weights) > 0  # reads their headers: missing, damaged and pickled files are errors here
    if text and not any((checkpoint.path / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"checkpoint {checkpoint.path} has no tokenizer.json, so text cannot be read or written")
    size = head_size(checkpoint.config)
    if size is not None and size not in CPU_HEAD_SIZES and not has_gpu():
        raise UnsupportedModel(
            f"vLLM has no CPU kernel for attention heads of {size} channels (it has: "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}); the embedded server and engine run this model"
        )


def head_size(config: Mapping[str, Any]) -> int | None:
    """Channels of an attention head by config.json, where it says so."""
    if (size := config.get("head_dim")) is not None:
        return int(size)
    width, heads = (next((config[k] for k in keys if config.get(k)), None) for keys in (WIDTH, HEADS))
    return int(width) // int(heads) if width and heads else None


def dtype_name(checkpoint: Checkpoint, asked: str | None) -> str:
    """vLLM's name of the type asked for, else the checkpoint's. (vLLM's own default turns fp32 into 16 bits.)"""
    if asked is not None:
        return DTYPES[asked]
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return stored if stored in ("float32", "bfloat16", "float16") else "auto"


def context_length(config: Mapping[str, Any]) -> int | None:
    """Most tokens that the model takes, by config.json."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
