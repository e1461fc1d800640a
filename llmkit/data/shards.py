"""Token shards: the files between data preparation and training, in llm.c's format.

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens: uint16 with
magic 20240520 and version 1, or uint32 with magic 20240801 and version 7 (llm.c's form for Llama 3's vocabulary).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 1024
#: dtype -> (magic, version)
FORMATS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


class ShardError(ValueError):
    """A file is not a whole token shard. The message names the file and what is wrong with it."""


def token_dtype(vocab_size: int) -> str:
    """The narrower of the two formats that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def header(dtype: str, tokens: int) -> bytes:
    """The 1024 bytes in front of `tokens` tokens."""
    fields = np.zeros(256, dtype="<i4")
    fields[:2] = FORMATS[dtype]
    if tokens >= 2**31:
        raise ShardError(f"a shard holds fewer than 2^31 tokens, not {tokens}")
    fields[2] = tokens
    return fields.tobytes()


def open_shard(path: Path) -> npt.NDArray[np.unsignedinteger]:
    """Memory-map the tokens of a shard, (tokens,) uint16 or uint32. Raises ShardError unless it is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise ShardError(f"{path} is not a token shard: {size} bytes, shorter than the header of {HEADER_BYTES}")
    magic, version, tokens = (int(field) for field in np.frombuffer(head, dtype="<i4", count=3))
    dtype = {known: name for name, (known, _) in FORMATS.items()}.get(magic)
    if dtype is None:
        raise ShardError(f"{path} is not a token shard: it begins with {magic}, not 20240520 or 20240801")
    if version != FORMATS[dtype][1]:
        raise ShardError(f"{path} has version {version} of the shard format, but only {FORMATS[dtype][1]} is known")
    expected = HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise ShardError(f"{path} is truncated or damaged: {size} bytes where its header promises {expected}")
    if tokens == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=HEADER_BYTES, shape=(tokens,))


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard that was written: file name and number of tokens."""

    name: str
    tokens: int


class ShardWriter:
    """Writes a stream of tokens as `<prefix>_000000.bin`, `<prefix>_000001.bin`, … of at most `shard_tokens` each."""

    def __init__(self, directory: Path, prefix: str, dtype: str, shard_tokens: int) -> None:
        if not 2 <= shard_tokens < 2**31:
            raise ValueError(f"a shard holds from 2 to 2^31 - 1 tokens, not {shard_tokens}")
        self.directory, self.prefix, self.dtype, self.shard_tokens = directory, prefix, dtype, shard_tokens
        self.shards: list[ShardInfo] = []
        self._file: IO[bytes] | None = None
        self._written = 0  # tokens in the open shard

    @property
    def tokens(self) -> int:
        """Tokens written so far, all shards together."""
        return sum(shard.tokens for shard in self.shards) + (self._written if self._file else 0)

    def write(self, tokens: npt.NDArray[np.unsignedinteger]) -> None:
        """Append tokens (any number); a document may run on into the next shard. Raises OSError, naming the file."""
        with self._named_errors():
            self._write(tokens)

    def _write(self, tokens: npt.NDArray[np.unsignedinteger]) -> None:
        done = 0
        while done < len(tokens):
            if self._file is None:
                self._file = self._path().open("wb")
                self._file.write(header(self.dtype, 0))
                self._written = 0
            part = tokens[done : done + self.shard_tokens - self._written]
            self._file.write(part.astype(np.dtype(self.dtype).newbyteorder("<"), copy=False).tobytes())
            self._written += len(part)
            done += len(part)
            if self._written == self.shard_tokens:
                self._finish()

    def _path(self) -> Path:
        return self.directory / f"{self.prefix}_{len(self.shards):06d}.bin"

    def _finish(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(header(self.dtype, self._written))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.shards.append(ShardInfo(self._path().name, self._written))
        self._file = None

    def close(self) -> list[ShardInfo]:
        """Finish the last shard; the shards in order. Raises OSError, naming the file."""
        with self._named_errors():
            if self._file is not None:
                self._finish()
        return self.shards

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the file in an error such as a full disk, and let go of it: what it buffers cannot be written either."""
        try:
            yield
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
            raise OSError(error.errno, error.strerror, str(self._path())) from error
