"""The C library's layers one by one, for its tests and benchmarks: numpy arrays in, numpy arrays out.

Every layer exists in float and in bf16 (arrays of uint16, the upper halves of fp32), and as a plain reference.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit_llmc.library import Library, pointer

Array = npt.NDArray[Any]


class Matrix(ctypes.Structure):
    """A strided matrix: element (i, j) at i * row_stride + j * col_stride."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


class Gemm(ctypes.Structure):
    """One matrix product: c (m, n) = a (m, k) b (k, n)."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("m", "n", "k")],
        *[(name, Matrix) for name in ("a", "b", "c")],
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("accumulate", ctypes.c_int),
        ("sink", ctypes.c_void_p),
    ]


class Workspace(ctypes.Structure):
    """Scratch memory; the library makes it grow."""

    _fields_ = [
        ("threads", ctypes.c_int),
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_size_t),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_size_t),
    ]


def matrix(array: Array, *, transposed: bool = False) -> Matrix:
    """A dense row-major array (fp32, or uint16 for bf16), or its transpose, as an operand."""
    assert array.ndim == 2 and array.flags.c_contiguous
    strides = (1, array.shape[1]) if transposed else (array.shape[1], 1)
    operand = Matrix(array.ctypes.data, *strides, int(array.dtype == np.uint16))
    operand.array = array  # lives as long as the operand
    return operand


class Kernels:
    """The layers of a library, on `threads` threads. float or bf16 is told by the arrays' dtype."""

    def __init__(self, library: Library, threads: int = 1) -> None:
        self.library, self.threads = library, threads
        self.workspace = Workspace(threads=threads)

    def close(self) -> None:
        """Free the scratch memory."""
        self.library.workspace_free(ctypes.byref(self.workspace))

    def call(self, name: str, *arguments: Any, suffix: str = "", fails: bool = False, scratch: bool = False) -> None:
        """Call `name` + `suffix` with arrays as pointers, ints as int64 and floats as float.

        `scratch`: the workspace comes last; otherwise the number of threads does, unless the name is a reference.
        """
        converted: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                converted.append(pointer(argument))
            elif isinstance(argument, bool):
                converted.append(ctypes.c_int(argument))
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                converted.append(ctypes.c_float(argument))
            else:
                converted.append(argument)
        if scratch:
            converted.append(ctypes.byref(self.workspace))
        elif suffix:
            converted.append(ctypes.c_int(self.threads))
        if fails:
            self.library.call(name + suffix, *converted)
        else:
            getattr(self.library, name + suffix)(*converted)

    def gemm(self, m: int, n: int, k: int, a: Matrix, b: Matrix, c: Matrix, **more: Any) -> None:
        """One product; `more` are the other fields of Gemm."""
        product = Gemm(m=m, n=n, k=k, a=a, b=b, c=c, **more)
        self.library.call("gemm", ctypes.byref(product), ctypes.byref(self.workspace))
