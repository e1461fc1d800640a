"""Small real things to test against, made in milliseconds without PyTorch: a checkpoint and a data folder."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from llmkit.checkpoint import Checkpoint, save_checkpoint
from llmkit.data.shards import ShardWriter, token_dtype
from llmkit.data.tokens import META_FORMAT, TokenData
from llmkit.files import new_directory, write_json
from llmkit.gpt2 import GPT2Config, hf_shapes
from llmkit.tokenizer import Tokenizer, load_tokenizer

#: a text of our own, repetitive enough that a tiny model learns from it in a few steps
TEXT = "\n".join(
    f"{number} and {other} make {number + other}; {number} times {other} make {number * other}."
    for number in range(2, 22)
    for other in range(2, 12)
)


def tiny_checkpoint(path: Path, *, context: int = 64, seed: int = 0, scale: float = 0.4, width: int = 32) -> Checkpoint:
    """Write a GPT-2 of 2 layers, 2 heads and `width` channels with random weights and the byte tokenizer.

    `scale` is the deviation of the matrices: far from uniform predictions, but no ties and no certainties.
    """
    tokenizer = load_tokenizer("byte")
    config = GPT2Config(vocab=tokenizer.vocab_size, context=context, depth=2, heads=2, width=width)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in hf_shapes(config).items():
        if name.endswith("bias"):
            weights[name] = rng.normal(0, 0.02, shape).astype(np.float32)
        elif "ln_" in name:
            weights[name] = np.ones(shape, dtype=np.float32)
        else:
            weights[name] = rng.normal(0, scale / math.sqrt(2), shape).astype(np.float32)
    save_checkpoint(
        path,
        config=config.to_hf(eot_id=tokenizer.eot_id),
        weights=weights,
        tokenizer=tokenizer,
        provenance={"backend": "random"},
    )
    return Checkpoint.open(path)


def tiny_data(
    path: Path,
    *,
    text: str = TEXT,
    tokenizer: Tokenizer | None = None,
    shard_tokens: int = 4096,
    val_fraction: float = 0.1,
) -> TokenData:
    """Write a data folder as `llmkit data prepare` would: the text's lines in documents of ten, the last held out."""
    tokenizer = tokenizer or load_tokenizer("byte")
    lines = text.splitlines(keepends=True)
    documents = ["".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]
    cut = max(1, round(len(documents) * val_fraction))
    dtype = token_dtype(tokenizer.vocab_size)
    with new_directory(path) as folder:
        meta: dict[str, object] = {"format": META_FORMAT, "dtype": dtype, "sources": ["a test"]}
        for split, part in (("train", documents[:-cut]), ("val", documents[-cut:])):
            writer = ShardWriter(folder, split, dtype, shard_tokens)
            start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
            for document in part:
                writer.write(np.array(start + tokenizer.encode(document), dtype=dtype))
            meta[split] = {
                "tokens": writer.tokens,
                "bytes": sum(len(document.encode()) for document in part),
                "documents": len(part),
                "shards": [{"name": shard.name, "tokens": shard.tokens} for shard in writer.close()],
            }
        meta["tokenizer"] = {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "fingerprint": tokenizer.fingerprint,
        }
        meta["fingerprint"] = f"{tokenizer.fingerprint}-{zlib.crc32(text.encode()):x}"
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        write_json(folder / "meta.json", meta)
    return TokenData(path)
