"""Runner: the compiled forward pass with its memory. A step takes runs of tokens with their cache blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmkit_engine import library as lib
from llmkit_engine.library import KV_BLOCK, library
from llmkit_engine.rope import tables
from llmkit_engine.spec import ModelSpec
from llmkit_engine.weights import Weights

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class Run:
    """Consecutive tokens of one sequence: `tokens` from position `first`, with the blocks that hold positions 0, 1, …

    `wanted`: which of the tokens, by index in `tokens`, need logits.
    """

    tokens: Sequence[int]
    first: int
    blocks: Sequence[int]
    wanted: Sequence[int] = ()


class Runner:
    """A model with a cache of `blocks` blocks. Not to be used by two threads at once."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, *, context: int, blocks: int, tokens: int, rows: int, threads: int
    ) -> None:
        """`tokens` and `rows` (of logits) bound a step. Raises MemoryError."""
        self.spec, self.weights, self.blocks, self.threads = spec, weights, blocks, threads
        self.max_tokens, self.max_rows = tokens, rows
        self.block_floats = block_floats(spec)
        self.cache: Floats = np.zeros(len(spec.blocks) * blocks * self.block_floats, dtype=np.float32)
        self.logits: Floats = np.empty((rows, spec.vocab), dtype=np.float32)
        self._rope = tables(spec.rope, spec.head_dim, context) if spec.rope is not None else None
        self._handle = library().lk_open(ctypes.byref(weights.model), tokens, rows, context, threads)
        if not self._handle:
            raise MemoryError("no memory for the engine's scratch space")

    def close(self) -> None:
        if self._handle:
            library().lk_close(self._handle)
            self._handle = None

    def forward(self, runs: Sequence[Run]) -> Floats:
        """Run the tokens and write their keys and values into the cache. Logits (R, V) of those wanted, in order.

        The result is a view of memory that the next step overwrites.
        """
        assert self._handle, "the engine is closed"
        ids = np.array([token for run in runs for token in run.tokens], dtype=np.int32)
        start = np.zeros(len(runs) + 1, dtype=np.int32)
        np.cumsum([len(run.tokens) for run in runs], out=start[1:])
        table = np.zeros((len(runs), max(len(run.blocks) for run in runs)), dtype=np.int32)
        pos, slot = np.empty_like(ids), np.empty_like(ids)
        row: list[int] = []
        for index, run in enumerate(runs):
            table[index, : len(run.blocks)] = run.blocks
            span = slice(start[index], start[index + 1])
            pos[span] = positions = np.arange(run.first, run.first + len(run.tokens), dtype=np.int32)
            slot[span] = table[index, positions // KV_BLOCK] * KV_BLOCK + positions % KV_BLOCK
            row.extend(int(start[index]) + at for at in run.wanted)
        rows = np.array(row, dtype=np.int32)
        step = lib.Step(
            tokens=len(ids),
            sequences=len(runs),
            rows=len(rows),
            table_stride=table.shape[1],
            logits=self.logits.ctypes.data,
            cos=None if self._rope is None else self._rope[0].ctypes.data,
            sin=None if self._rope is None else self._rope[1].ctypes.data,
            cache=self.cache.ctypes.data,
            blocks=self.blocks,
            ids=ids.ctypes.data,
            pos=pos.ctypes.data,
            slot=slot.ctypes.data,
            start=start.ctypes.data,
            table=table.ctypes.data,
            row=rows.ctypes.data,
        )
        failed = library().lk_forward(self._handle, ctypes.byref(step))
        assert not failed, "a step larger than was planned for"
        return self.logits[: len(rows)]

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block in all layers."""
        layers = len(self.spec.blocks)
        library().lk_copy_block(self.cache.ctypes.data, layers, self.blocks, self.block_floats, source, target)

    def statistics(self, logits: Floats) -> tuple[Floats, Ints]:
        """(R,) logsumexp and (R,) argmax of rows of logits."""
        lse, argmax = np.empty(len(logits), dtype=np.float32), np.empty(len(logits), dtype=np.int32)
        library().lk_statistics(logits.ctypes.data, *logits.shape, lse.ctypes.data, argmax.ctypes.data, self.threads)
        return lse, argmax

    def argmax(self, logits: Floats) -> Ints:
        """(R,) the likeliest ids, the lowest at a tie."""
        argmax = np.empty(len(logits), dtype=np.int32)
        library().lk_statistics(logits.ctypes.data, *logits.shape, None, argmax.ctypes.data, self.threads)
        return argmax

    def sample(self, logits: Floats, draws: Sequence[lib.Draw]) -> Ints:
        """(R,) ids drawn from rows of logits."""
        tokens = np.empty(len(logits), dtype=np.int32)
        array = (lib.Draw * len(draws))(*draws)
        if library().lk_sample(logits.ctypes.data, *logits.shape, array, tokens.ctypes.data, self.threads):
            raise MemoryError("no memory to sample")
        return tokens


def block_floats(spec: ModelSpec) -> int:
    """Floats of one block in one layer: keys, and values padded to whole vectors, of all kv heads."""
    padded = -(-spec.head_dim // KV_BLOCK) * KV_BLOCK
    return spec.kv_heads * KV_BLOCK * (spec.head_dim + padded)
