"""The C library through ctypes: `Library` wraps its functions, `Model` a model that lives in it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.gpt2 import PARAMETERS, GPT2Config, parameter_shape
from llmkit_llmc.build import build

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
DTYPES = {"fp32": 0, "bf16": 1}
i32, i64, f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Error(ctypes.Structure):
    """llmc_error."""

    _fields_ = [("text", ctypes.c_char * 768), ("where", ctypes.c_char * 64)]


class Shape(ctypes.Structure):
    """llmc_config."""

    _fields_ = [(name, i32) for name in ("max_t", "vocab", "padded_vocab", "layers", "heads", "channels")]


class Options(ctypes.Structure):
    """llmc_options."""

    _fields_ = [(name, i32) for name in ("dtype", "threads", "recompute", "master", "rank", "ranks")]


class AdamW(ctypes.Structure):
    """llmc_adamw."""

    _fields_ = [
        *[(name, f32) for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_scale")],
        ("step", i32),
        ("seed", ctypes.c_uint32),
    ]


class LlmcError(ValueError):
    """What the library reported; `where` is the line of C that noticed it."""

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self.where = where


class Library:
    """A loaded libllmc."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._lib.llmc_build.restype = ctypes.c_char_p
        self._lib.llmc_model_grad_square.restype = ctypes.c_double
        self._lib.llmc_model_gradients.restype = ctypes.c_void_p
        self._lib.llmc_param_count.restype = i64
        for name in ("llmc_machine_peak", "llmc_outliers_add", "llmc_comm_sum"):
            getattr(self._lib, name).restype = ctypes.c_double

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self._lib, name)
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that reports failure through a trailing llmc_error. Raises LlmcError."""
        error = Error()
        if getattr(self._lib, name)(*arguments, ctypes.byref(error)) != 0:
            raise LlmcError(error.text.decode("utf-8", "replace"), error.where.decode())

    @property
    def description(self) -> str:
        """Instruction set and abilities: "avx512 openmp"."""
        return str(self._lib.llmc_build().decode())

    @property
    def default_dtype(self) -> str:
        """bf16 where the machine has instructions for it, else fp32."""
        return "bf16" if self._lib.llmc_default_dtype() else "fp32"


@cache
def _load(path: Path) -> Library:
    return Library(path)


def load(*, mpi: bool = False) -> Library:
    """The library for this machine, compiled first where needed. Raises BuildError."""
    return _load(build(mpi=mpi).library)


def pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    """The address of a dense array."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class Model:
    """A GPT-2 in the library's memory. B batch, T positions; parameters are one flat fp32 vector, in table order."""

    def __init__(
        self,
        library: Library,
        shape: GPT2Config,
        *,
        dtype: str = "fp32",
        threads: int = 0,
        recompute: int = 2,
        master: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """A model of zeros; `initialise`, `set` or `load_arrays` gives it values. Raises LlmcError."""
        self.library, self.shape, self.dtype = library, shape, dtype
        self._config = Shape(shape.context, shape.vocab, shape.padded_vocab, shape.depth, shape.heads, shape.width)
        options = Options(DTYPES[dtype], threads, recompute, int(master), rank, ranks)
        self._model = ctypes.c_void_p()
        library.call("llmc_model_new", ctypes.byref(self._config), ctypes.byref(options), ctypes.byref(self._model))
        self.count = int(library.llmc_param_count(ctypes.byref(self._config)))

    def close(self) -> None:
        """Free the memory. The model cannot be used any more."""
        self.library.llmc_model_free(self._model)
        self._model = ctypes.c_void_p()

    @property
    def handle(self) -> ctypes.c_void_p:
        return self._model

    def initialise(self, seed: int) -> None:
        """GPT-2's initialisation, drawn as PyTorch does in module order."""
        self.library.llmc_model_init(self._model, ctypes.c_uint32(seed))

    def get(self) -> F32:
        """All parameters, flat."""
        values = np.empty(self.count, np.float32)
        self.library.llmc_model_get(self._model, pointer(values))
        return values

    def set(self, values: F32) -> None:
        """Replace all parameters, rounding them where the model is bf16."""
        values = np.ascontiguousarray(values, np.float32)
        assert values.shape == (self.count,)
        self.library.llmc_model_set(self._model, pointer(values))

    def load_arrays(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take llm.c's 16 arrays (`llmkit.gpt2.to_llmc`)."""
        self.set(np.concatenate([np.ravel(arrays[p.name]) for p in PARAMETERS], dtype=np.float32))

    def split(self, flat: F32) -> dict[str, F32]:
        """A flat vector as llm.c's 16 arrays: views."""
        arrays, start = {}, 0
        for parameter in PARAMETERS:
            one = parameter_shape(parameter, self.shape)
            shape = (self.shape.depth, *one) if parameter.layered else one
            size = int(np.prod(shape))
            arrays[parameter.name] = flat[start : start + size].reshape(shape)
            start += size
        return arrays

    def write(self, path: Path) -> None:
        """Write llm.c's model .bin of the model's dtype. Raises LlmcError."""
        self.library.call("llmc_model_write", self._model, os.fsencode(path))

    def loss(self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any]) -> tuple[float, F32]:
        """Mean loss in nats, and that of each token (B, T)."""
        x, y = np.ascontiguousarray(inputs, np.int32), np.ascontiguousarray(targets, np.int32)
        losses, mean = np.empty(x.shape, np.float32), ctypes.c_double()
        sizes = i64(x.shape[0]), i64(x.shape[1])
        self.library.call(
            "llmc_model_loss", self._model, pointer(x), pointer(y), *sizes, pointer(losses), ctypes.byref(mean)
        )
        return mean.value, losses

    def gradient(self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], *, scale: float, accumulate: bool) -> float:
        """Mean loss of a micro-batch (B, T); gradients of `scale` times the sum of its losses are written or added."""
        x, y = np.ascontiguousarray(inputs, np.int32), np.ascontiguousarray(targets, np.int32)
        mean = ctypes.c_double()
        sizes = i64(x.shape[0]), i64(x.shape[1]), f32(scale), ctypes.c_int(accumulate)
        self.library.call("llmc_model_gradient", self._model, pointer(x), pointer(y), *sizes, ctypes.byref(mean))
        return mean.value

    def gradients(self) -> F32:
        """A copy of all gradients, flat."""
        address = self.library.llmc_model_gradients(self._model)
        assert address, "gradient() has not been called"
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(f32)), (self.count,)).copy()

    def grad_square(self, lo: int = 0, hi: int | None = None) -> float:
        """Sum of squares of the gradients [lo, hi)."""
        return float(self.library.llmc_model_grad_square(self._model, i64(lo), i64(self.count if hi is None else hi)))

    def update(self, how: AdamW) -> None:
        """One AdamW step on this process's share."""
        self.library.call("llmc_model_update", self._model, ctypes.byref(how))

    def step(
        self, inputs: npt.NDArray[Any], targets: npt.NDArray[Any], how: AdamW, *, scale: float
    ) -> tuple[float, float]:
        """`gradient` and `update` in one, to the same bits, without storing gradients: mean loss, squared norm.

        For a batch of one micro-batch in one process, not clipped. Raises LlmcError.
        """
        x, y = np.ascontiguousarray(inputs, np.int32), np.ascontiguousarray(targets, np.int32)
        mean, square = ctypes.c_double(), ctypes.c_double()
        sizes = i64(x.shape[0]), i64(x.shape[1]), f32(scale)
        results = ctypes.byref(how), ctypes.byref(mean), ctypes.byref(square)
        self.library.call("llmc_model_step", self._model, pointer(x), pointer(y), *sizes, *results)
        return mean.value, square.value

    def logits(self, tokens: list[int]) -> F32:
        """Logits (V,) of the next token."""
        ids, logits = np.array(tokens, np.int32), np.empty(self.shape.vocab, np.float32)
        self.library.call("llmc_model_logits", self._model, pointer(ids), i64(len(ids)), pointer(logits))
        return logits

    def generate(self, prompt: list[int], tokens: int, *, temperature: float, top_k: int, seed: int) -> list[int]:
        """A continuation of `tokens` ids, fewer where the positions end."""
        total = min(self.shape.context, len(prompt) + tokens)
        ids = np.zeros(total, np.int32)
        ids[: len(prompt)] = prompt
        rng = ctypes.c_uint64(seed * 0x9E3779B97F4A7C15 + 1337 & 0xFFFFFFFFFFFFFFFF)
        sizes = i64(len(prompt)), i64(total), f32(temperature), ctypes.c_int(top_k)
        self.library.call("llmc_model_generate", self._model, pointer(ids), *sizes, ctypes.byref(rng))
        return [int(i) for i in ids[len(prompt) :]]
