"""The training state beside the weights (`State`, a file of the C library) and the processes of a run (`Comm`)."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from llmkit_llmc.library import Library, Model

u64 = ctypes.c_uint64


class Outliers(ctypes.Structure):
    """llmc_outliers: the last 128 values."""

    _fields_ = [("values", ctypes.c_double * 128), ("count", ctypes.c_int32), ("next", ctypes.c_int32)]


class State(ctypes.Structure):
    """llmc_state: step, seed of rounding, place in the data, outlier windows."""

    step: int
    shuffle: int
    rng: int
    rng_last: int
    sample: int
    loss: Outliers
    norm: Outliers

    _fields_ = [
        ("step", ctypes.c_int32),
        ("shuffle", ctypes.c_int32),
        ("rng", u64),
        ("rng_last", u64),
        ("shard", u64),
        ("sample", u64),
        ("shards", u64),
        ("samples", u64),
        ("shard_order", ctypes.c_void_p),
        ("sample_order", ctypes.c_void_p),
        ("mt", u64 * 315),
        ("loss", Outliers),
        ("norm", Outliers),
    ]

    def next_seed(self) -> int:
        """The seed of the next update's stochastic rounding (xorshift64*)."""
        x = self.rng
        self.rng_last = x
        x ^= x >> 12
        x ^= (x << 25) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 27
        self.rng = x
        return int((x * 0x2545F4914F6CDD1D & 0xFFFFFFFFFFFFFFFF) >> 32)

    def is_outlier(self, library: Library, loss: float, norm: float, skip_loss: float, skip_norm: float) -> bool:
        """Takes both values into their windows; is one beyond its limit (0 = none)?"""
        add = library.llmc_outliers_add
        z_loss = add(ctypes.byref(self.loss), ctypes.c_double(loss))
        z_norm = add(ctypes.byref(self.norm), ctypes.c_double(norm))
        return bool((skip_loss and z_loss > skip_loss) or (skip_norm and z_norm > skip_norm))

    def write(self, library: Library, model: Model, folder: Path, rank: int, *, position: int) -> None:
        """Write this process's file into `folder`. Raises LlmcError."""
        self.shuffle, self.sample = 0, position
        path = os.fsencode(state_path(folder, rank))
        library.call("llmc_state_write", model.handle, ctypes.byref(self), path)

    def read(self, library: Library, model: Model, folder: Path, comm: Comm) -> int:
        """Read it back; the place in the data. Raises LlmcError for another model or number of processes."""
        path = os.fsencode(state_path(folder, comm.rank))
        library.call("llmc_state_read", model.handle, ctypes.byref(self), path)
        return int(self.sample)


def state_path(folder: Path, rank: int) -> Path:
    """The state file of one process."""
    return folder / f"state_{rank:05d}.bin"


class _CComm(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int), ("ranks", ctypes.c_int)]


@dataclass(frozen=True)
class Comm:
    """The processes of a run. With one, every operation is the identity."""

    rank: int
    ranks: int

    @classmethod
    def open(cls, library: Library) -> Comm:
        """Start MPI in a process that mpirun started. Raises LlmcError."""
        comm = _CComm()
        library.call("llmc_comm_open", ctypes.byref(comm))
        return cls(comm.rank, comm.ranks)

    def _c(self) -> _CComm:
        return _CComm(self.rank, self.ranks)

    def share(self, count: int) -> tuple[int, int]:
        """The part of the flat parameter vector that this process updates."""
        return count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks

    def sum(self, library: Library, value: float) -> float:
        """Over all processes, in the order of ranks: the same bits everywhere."""
        if self.ranks == 1:
            return value
        return float(library.llmc_comm_sum(ctypes.byref(self._c()), ctypes.c_double(value)))

    def any(self, library: Library, value: bool) -> bool:
        """Is it true in some process?"""
        return bool(library.llmc_comm_max(ctypes.byref(self._c()), int(value))) if self.ranks > 1 else value

    def reduce_gradients(self, library: Library, model: Model) -> None:
        """This process's share becomes the sum over all processes."""
        library.call("llmc_comm_reduce_gradients", ctypes.byref(self._c()), model.handle)

    def gather_params(self, library: Library, model: Model) -> None:
        """Every process receives the shares that the others updated."""
        library.call("llmc_comm_gather_params", ctypes.byref(self._c()), model.handle)

    def barrier(self, library: Library) -> None:
        """Wait for all processes."""
        library.llmc_comm_barrier(ctypes.byref(self._c()))
