"""llm.c's model files: `.bin` checkpoints of version 3 (fp32) and 5 (bf16), read and written.

A header of 256 little-endian int32 (magic 20240326, version, maxT, V, L, NH, C, Vp), then the 16 parameter arrays in
the order of `llmkit.gpt2.PARAMETERS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmkit.gpt2 import PARAMETERS, GPT2Config, parameter_shape
from llmkit.weights import bf16_to_fp32, fp32_to_bf16

MODEL_MAGIC = 20240326
VERSIONS: dict[int, str] = {3: "fp32", 5: "bf16"}
TOKENIZER_MAGIC = 20240328


def is_llmc_model(path: Path) -> bool:
    """Does the file begin as a llm.c model does?"""
    with path.open("rb") as file:
        return file.read(4) == MODEL_MAGIC.to_bytes(4, "little")


def read_model(path: Path) -> tuple[GPT2Config, dict[str, npt.NDArray[np.float32]]]:
    """Configuration and the 16 arrays in fp32. Raises ValueError for a foreign, damaged or truncated file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(1024), dtype="<i4")
    if len(head) < 256 or head[0] != MODEL_MAGIC:
        raise ValueError(f"{path} is not a llm.c model: it does not begin with {MODEL_MAGIC}")
    version, context, vocab, depth, heads, width, padded = (int(field) for field in head[1:8])
    if version not in VERSIONS:
        raise ValueError(f"{path} has version {version}; llm.c models of version 3 (fp32) and 5 (bf16) can be read")
    try:
        config = GPT2Config(vocab=vocab, context=context, depth=depth, heads=heads, width=width)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if padded != config.padded_vocab:
        raise ValueError(f"{path} pads a vocabulary of {vocab} to {padded}, not to {config.padded_vocab}")
    dtype = np.dtype("<f4" if VERSIONS[version] == "fp32" else "<u2")
    expected = 1024 + llmc_parameters(config) * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} is truncated or damaged: {size} bytes where its header promises {expected}")
    flat = np.memmap(path, dtype=dtype, mode="r", offset=1024)
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    start = 0
    for parameter in PARAMETERS:
        shape = parameter_shape(parameter, config)
        shape = (depth, *shape) if parameter.layered else shape
        end = start + int(np.prod(shape))
        part = flat[start:end]
        arrays[parameter.name] = (bf16_to_fp32(part) if dtype.itemsize == 2 else part.astype(np.float32)).reshape(shape)
        start = end
    return config, arrays


def write_model(
    path: Path, config: GPT2Config, arrays: Mapping[str, npt.NDArray[Any]], *, dtype: Literal["fp32", "bf16"] = "fp32"
) -> None:
    """Write the 16 arrays (fp32, rounded to nearest even for bf16), whole or not at all."""
    head = np.zeros(256, dtype="<i4")
    version = next(number for number, name in VERSIONS.items() if name == dtype)
    c = config
    head[:8] = (MODEL_MAGIC, version, c.context, c.vocab, c.depth, c.heads, c.width, c.padded_vocab)
    beside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with beside.open("wb") as file:
            file.write(head.tobytes())
            for parameter in PARAMETERS:
                array = np.ascontiguousarray(arrays[parameter.name], dtype="<f4")
                file.write((fp32_to_bf16(array) if dtype == "bf16" else array).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def llmc_parameters(config: GPT2Config) -> int:
    """Number of parameters in llm.c's layout, padding included."""
    total = 0
    for parameter in PARAMETERS:
        total += int(np.prod(parameter_shape(parameter, config))) * (config.depth if parameter.layered else 1)
    return total


def write_tokenizer(path: Path, token_bytes: list[bytes], eot_id: int) -> None:
    """llm.c's tokenizer file, version 2: what it needs to print samples. ValueError for a token over 255 bytes."""
    head = np.zeros(256, dtype="<i4")
    head[:4] = (TOKENIZER_MAGIC, 2, len(token_bytes), eot_id)
    for index, token in enumerate(token_bytes):
        if len(token) > 255:
            raise ValueError(f"token {index} has {len(token)} bytes; llm.c's tokenizer file holds at most 255")
    body = b"".join(bytes([len(token)]) + token for token in token_bytes)
    path.write_bytes(head.tobytes() + body)
