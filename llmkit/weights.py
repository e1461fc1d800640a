"""Weights as numpy arrays: reading and writing safetensors, bf16 included, without PyTorch.

numpy has no bf16, so such tensors travel as uint16 with the upper half of the fp32 bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def bf16_to_fp32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class WeightFiles(Mapping[str, npt.NDArray[np.float32]]):
    """The tensors of a checkpoint folder by name, each read as fp32 when asked for.

    Raises ValueError where there are no safetensors, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        self._headers: dict[Path, dict[str, Any]] = {}
        for path in self._files(folder):
            header = read_header(path)
            self._headers[path] = header
            self._where.update(dict.fromkeys((name for name in header if name != "__metadata__"), path))

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            for name in names:
                if Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"{index} names the file {name!r}, which is not in {folder}")
            return [folder / name for name in names]
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"{folder} holds pickled weights only ({pickled[0]}), which are not opened because they can run code: "
                "convert them to safetensors first"
            )
        raise ValueError(f"{folder} has no weights: model.safetensors is missing")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._headers[path][name]["shape"]) for name, path in self._where.items()}

    def dtype(self, name: str) -> str:
        """safetensors' name of the stored type: F32, BF16, F16, …"""
        return str(self._headers[self._where[name]][name]["dtype"])

    def stored(self, name: str) -> Array:
        """The tensor as it lies in the file, mapped and not read: fp64, fp32, fp16, or bf16 as uint16.

        Raises ValueError for another type.
        """
        path = self._where[name]
        entry = self._headers[path][name]
        start, end = entry["data_offsets"]
        types = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "F64": "<f8"}
        if entry["dtype"] not in types:
            raise ValueError(f"tensor {name} in {path} is {entry['dtype']}, which is not a floating-point type")
        offset = entry["__base__"] + start
        dtype = np.dtype(types[entry["dtype"]])
        flat = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=((end - start) // dtype.itemsize,))
        return flat.reshape(entry["shape"])

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        values = self.stored(name)
        return bf16_to_fp32(values) if values.dtype == np.uint16 else values.astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_header(path: Path) -> dict[str, Any]:
    """The table of a safetensors file; each entry gains `__base__`, where the data begin. ValueError if damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # the library's own checks: offsets, sizes, overlaps
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            entry["__base__"] = 8 + length
    return header


def save_weights(path: Path, weights: Mapping[str, Array], *, dtype: str = "fp32") -> None:
    """Write a safetensors file of fp32 arrays, rounded to bf16 where asked. `pt` metadata, as transformers wants.

    Raises OSError where it cannot be written.
    """
    from safetensors import SafetensorError, TensorSpec, serialize_file

    if dtype == "bf16":
        name_of_type = "bfloat16"
        arrays = {name: fp32_to_bf16(array) for name, array in weights.items()}
    else:
        name_of_type = "float32"
        arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in weights.items()}
    specs = {  # they point into `arrays`, which must therefore live until all is written
        name: TensorSpec(dtype=name_of_type, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    try:
        serialize_file(specs, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
