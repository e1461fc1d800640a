"""Encoding batches of documents, in worker processes, in order: the result does not depend on the number of workers."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmkit.tokenizer import Tokenizer, load_tokenizer

Role = Literal["train", "val", "either"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of one role; `either` means that the hash of its text decides. `position` as in `Text`."""

    texts: list[str]
    role: Role
    position: float | None


@dataclass(slots=True)
class Encoded:
    """Tokens of a batch: (sum(counts),) uint16 or uint32; per document its tokens, UTF-8 bytes and split."""

    tokens: npt.NDArray[np.unsignedinteger]
    counts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    validation: npt.NDArray[np.bool_]

    def first(self, documents: int) -> Encoded:
        """Only the first `documents` documents."""
        end = int(self.counts[:documents].sum())
        return Encoded(self.tokens[:end], self.counts[:documents], self.sizes[:documents], self.validation[:documents])


class Encoder:
    """Encodes batches with a tokenizer, each document behind an end-of-text token where the tokenizer has one."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, val_fraction: float) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self._threshold = int(val_fraction * 2**64)

    def __call__(self, batch: Batch) -> Encoded:
        begin = [] if self.tokenizer.eot_id is None else [self.tokenizer.eot_id]
        documents = [np.array(begin + ids, dtype=self.dtype) for ids in self.tokenizer.encode_batch(batch.texts)]
        raw = [text.encode() for text in batch.texts]
        if batch.role == "either":
            validation = [_hash(text) < self._threshold for text in raw]
        else:
            validation = [batch.role == "val"] * len(raw)
        return Encoded(
            np.concatenate(documents),
            np.array([len(document) for document in documents], dtype=np.int64),
            np.array([len(text) for text in raw], dtype=np.int64),
            np.array(validation, dtype=np.bool_),
        )


def _hash(text: bytes) -> int:
    """Uniform in [0, 2^64), from the text alone: equal documents are in the same split, wherever they stand."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def encode_all(
    batches: Iterable[Batch], tokenizer_folder: Path, *, dtype: str, val_fraction: float, workers: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Each batch with its encoding, in order; with one worker in this process, else in `workers` others.

    The tokenizer is read from its folder. At most a few batches a worker are held at once. Raises RuntimeError where a
    worker process was killed. Worker processes start afresh ("spawn"), so a script that calls this needs the usual
    `if __name__ == "__main__":`.
    """
    if workers == 1:
        encoder = Encoder(load_tokenizer(tokenizer_folder), dtype, val_fraction)
        for batch in batches:
            yield batch, encoder(batch)
        return
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer_folder, dtype, val_fraction)
    )
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            with _interrupts_held():
                waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) > 2 * workers:
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was killed or could not start; if memory ran out, prepare with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class WorkerDied(OSError):
    """A worker process ended before its work was done."""


def _finished(waiting: deque[tuple[Batch, Future[Encoded]]]) -> tuple[Batch, Encoded]:
    batch, future = waiting.popleft()
    return batch, future.result()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a process may be started: it inherits the mask, so Ctrl-C reaches the parent alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(tokenizer_folder: Path, dtype: str, val_fraction: float) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer_folder), dtype, val_fraction)


def _end_with_parent() -> None:
    """End this worker when its parent was killed; it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: Batch) -> Encoded:
    assert _encoder is not None
    return _encoder(batch)
