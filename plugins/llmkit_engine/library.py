"""The compiled library through ctypes: its structures, as csrc/engine.h has them, and its functions with their types.

ctypes releases the interpreter's lock during a call, so other Python threads go on while a step runs.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

from llmkit_engine.build import build

KV_BLOCK = 16  # tokens in a block of the cache, as in engine.h

#: how weights are stored, as in engine.h
F32, BF16, INT8, F16, PAIRS, BYTES = range(6)
NORMS = {"layer": 0, "rms": 1}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4}


class Packed(Structure):
    """Packed weights of a linear layer."""

    _fields_ = [
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int64),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
    ]


class Layer(Structure):
    """One block's weights."""

    _fields_ = [
        *((name, c_void_p) for name in ("norm1_w", "norm1_b", "norm2_w", "norm2_b")),
        *((name, Packed) for name in ("qkv", "out", "up", "down")),
        *((name, c_float) for name in ("stream", "embedded", "skip", "value")),
    ]


class Model(Structure):
    """A model: sizes, kinds and weights."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "rotary_dim")
        ),
        *((name, c_int64) for name in ("norm", "activation", "gated", "embedding_dtype", "qk_norm", "mixes", "window")),
        *((name, c_float) for name in ("eps", "attention_scale", "softcap")),
        ("layer", POINTER(Layer)),
        ("final_w", c_void_p),
        ("final_b", c_void_p),
        ("head", Packed),
        ("embedding", c_void_p),
        ("positions", c_void_p),
    ]


class Step(Structure):
    """A ragged batch."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "sequences", "rows")),
        *((name, c_void_p) for name in ("ids", "pos", "slot", "start", "table")),
        ("table_stride", c_int64),
        *((name, c_void_p) for name in ("row", "logits", "cos", "sin", "cache")),
        ("blocks", c_int64),
    ]


class Draw(Structure):
    """How one row of logits becomes a token, as csrc/sample.c has it."""

    _fields_ = [
        ("uniform", ctypes.c_double),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
    ]


@functools.cache
def _load(path: str) -> Any:
    library = ctypes.CDLL(path)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "lk_panel": (c_int64, []),
        "lk_kinds": (c_int, []),
        "lk_packed_bytes": (c_int64, [c_int64, c_int64, c_int64]),
        "lk_pack": (
            c_int,
            [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int],
        ),
        "lk_open": (c_void_p, [POINTER(Model), c_int64, c_int64, c_int64, c_int]),
        "lk_close": (None, [c_void_p]),
        "lk_forward": (c_int, [c_void_p, POINTER(Step)]),
        "lk_copy_block": (None, [c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64]),
        "lk_statistics": (None, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int]),
        "lk_sample": (c_int, [c_void_p, c_int64, c_int64, POINTER(Draw), c_void_p, c_int]),
        "lk_threads": (c_int, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def library() -> Any:
    """The library, compiled on first use. Raises BuildError."""
    return _load(str(build()))
