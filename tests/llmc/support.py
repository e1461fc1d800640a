"""What the tests of llmc share: comparison, bf16, and an independent writer of llm.c's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

TOLERANCE = {"f32": 1e-5, "bf16": 1e-2}
RNG_MATRIX = (0, 0x9908B0DF)


def error(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-30))


def normal(rng: np.random.Generator, *shape: int, dtype: str = "f32", scale: float = 1.0) -> Any:
    """Normal values as the layer takes them: fp32, or bf16 as uint16."""
    values = (rng.standard_normal(shape) * scale).astype(np.float32)
    return to_bf16(values) if dtype == "bf16" else values


def to_bf16(values: Any) -> Any:
    """Rounded by PyTorch: an implementation that is not ours."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


def values_of(array: Any) -> torch.Tensor:
    """An fp32 or bf16 array as float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(np.asarray(array, np.float64))


def empty_like(*shape: int, dtype: str) -> Any:
    """Room for a result, full of NaN, so that a value that was not written shows."""
    return np.full(shape, 0x7FC0, np.uint16) if dtype == "bf16" else np.full(shape, np.nan, np.float32)


def header(*fields: int) -> bytes:
    """256 little-endian int32."""
    return np.array([*fields, *[0] * (256 - len(fields))], "<i4").tobytes()


def shard_bytes(tokens: Any, *, wide: bool = False) -> bytes:
    """A token shard: GPT-2's, or Llama 3's with 32 bits a token."""
    tokens = np.asarray(tokens)
    head = header(20240801, 7, len(tokens)) if wide else header(20240520, 1, len(tokens))
    return head + tokens.astype("<u4" if wide else "<u2").tobytes()


def parameter_shapes(V: int, T: int, C: int, L: int) -> list[tuple[int, ...]]:
    """The 16 arrays of a model file, in order, as the format's description lists them."""
    Vp = (V + 127) // 128 * 128
    return [
        (Vp, C), (T, C), (L, C), (L, C), (L, 3 * C, C), (L, 3 * C), (L, C, C), (L, C), (L, C), (L, C),
        (L, 4 * C, C), (L, 4 * C), (L, C, 4 * C), (L, C), (C,), (C,),
    ]  # fmt: skip


def model_bytes(rng: np.random.Generator, *, V: int, T: int, C: int, L: int, NH: int, dtype: str = "f32") -> bytes:
    """A model file of random values, its padding zero."""
    parts = [(rng.standard_normal(shape) * 0.05).astype(np.float32) for shape in parameter_shapes(V, T, C, L)]
    parts[0][V:] = 0
    for index in (2, 8, 14):
        parts[index] += 1
    flat = np.concatenate([part.ravel() for part in parts])
    body = to_bf16(flat).astype("<u2").tobytes() if dtype == "bf16" else flat.astype("<f4").tobytes()
    return header(20240326, 5 if dtype == "bf16" else 3, T, V, L, NH, C, (V + 127) // 128 * 128) + body


class Twister:
    """mt19937 as numpy implements it, with llm.c's permutation: Fisher-Yates from the end, one output modulo i + 1."""

    def __init__(self, seed: int) -> None:
        self.seed, self._state, self._drawn = seed, np.random.RandomState(seed), False

    def shuffle(self, items: list[int]) -> list[int]:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = int(self._state.randint(0, 2**32, dtype=np.uint32)) % (i + 1)
            items[i], items[j] = items[j], items[i]
            self._drawn = True
        return items

    def stored(self) -> bytes:
        """As a state file keeps it, 2520 bytes: seed, outputs left + 1, next output, state, constants."""
        state: Any = self._state.get_state(legacy=True)
        _, key, position, *_ = state
        left, following = (625 - position, position) if self._drawn else (1, 0)
        head = np.array([0], "<u8").tobytes() + np.array([left, following], "<i4").tobytes()
        return head + np.asarray(key, "<u4").tobytes() + np.array(RNG_MATRIX, "<u4").tobytes()


def write_text_shards(folder: Path, text: bytes, *, train: int = 2) -> None:
    """Byte tokens of a text: train_0.bin … and val_0.bin (the last tenth)."""
    tokens = np.frombuffer(text, np.uint8)
    split = len(tokens) * 9 // 10
    for index, part in enumerate(np.array_split(tokens[:split], train)):
        (folder / f"train_{index}.bin").write_bytes(shard_bytes(part))
    (folder / "val_0.bin").write_bytes(shard_bytes(tokens[split:]))
