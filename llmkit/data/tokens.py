"""TokenData: an opened folder of token shards with its meta.json and tokenizer, and the batches drawn from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmkit.data.shards import open_shard
from llmkit.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.unsignedinteger]
Batch = npt.NDArray[np.int64]

META = "meta.json"
META_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SplitMeta:
    """Counts of one split; `bytes` is UTF-8 bytes of its text, without end-of-text tokens."""

    tokens: int
    bytes: int
    documents: int
    shards: tuple[str, ...]


class TokenData:
    """A folder made by `llmkit data prepare`.

    Attributes:
        fingerprint: hash of the tokens and of the tokenizer; training records it and refuses to resume on another.
        tokenizer_fingerprint: `Tokenizer.fingerprint` of the tokenizer that made the tokens.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the folder. Raises ValueError where it is empty, half-written, or does not match its meta.json."""
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        self.splits: dict[Split, SplitMeta] = {}
        names: tuple[Split, ...] = ("train", "val")
        try:
            for name in names:
                split = self.meta[name]
                self.splits[name] = SplitMeta(
                    split["tokens"], split["bytes"], split["documents"], tuple(s["name"] for s in split["shards"])
                )
            self.fingerprint: str = self.meta["fingerprint"]
            self.tokenizer_fingerprint: str = self.meta["tokenizer"]["fingerprint"]
            self.vocab_size: int = self.meta["tokenizer"]["vocab_size"]
            self.eot_id: int | None = self.meta["tokenizer"]["eot_id"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path / META} is damaged (it lacks {error}): prepare the data again") from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises ValueError where its folder holds another one."""
        tokenizer = load_tokenizer(self.path / "tokenizer")
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise ValueError(f"the tokens in {self.path} were made by another tokenizer than the one in its folder")
        tokenizer.name = self.meta["tokenizer"]["name"]
        return tokenizer

    def shard_paths(self, split: Split) -> list[Path]:
        return [self.path / name for name in self.splits[split].shards]

    def shards(self, split: Split) -> list[Tokens]:
        """The shards of a split, memory-mapped. Raises ValueError for one that is missing, truncated or foreign."""
        arrays = []
        for path, meta in zip(self.shard_paths(split), self.meta[split]["shards"], strict=True):
            if not path.is_file():
                raise ValueError(f"{path} is missing; prepare the data again")
            array = open_shard(path)
            if len(array) != meta["tokens"]:
                raise ValueError(f"{path} has {len(array)} tokens where {META} says {meta['tokens']}")
            arrays.append(array)
        return arrays

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """(vocab_size,) UTF-8 bytes that each token stands for; 0 for special tokens."""
        special = set(self.tokenizer.special_tokens.values())
        lengths = [0 if i in special else len(self.tokenizer.decode_bytes([i])) for i in range(self.vocab_size)]
        return np.array(lengths, dtype=np.int64)


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"there is no data folder {path}; make one with: llmkit data prepare SOURCE --out {path}")
    try:
        meta = json.loads((path / META).read_text("utf-8"))
    except FileNotFoundError:
        what = (
            "is empty"
            if not any(path.iterdir())
            else f"has no {META}: its preparation did not finish, or it is no data folder"
        )
        raise ValueError(f"data folder {path} {what}; make it with: llmkit data prepare SOURCE --out {path}") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path / META} is damaged: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != META_FORMAT:
        raise ValueError(f"{path / META} is not a data description that this version of llmkit reads")
    return meta


class TrainBatches:
    """Endless shuffled batches; one epoch takes each sequence of the training split once.

    A sequence is `sequence_length` consecutive tokens of a shard. Each epoch permutes the shards, then the sequences in
    each shard, so that a batch mixes documents while only one shard's permutation is in memory. The order is a function
    of the seed and of `position` alone: resuming needs nothing else. With several processes, a step sees the same
    tokens whatever their number: process `rank` takes the `rank`-th of every `world` consecutive batches.

    (llm.c permutes whole micro-batches of neighbouring sequences instead; on small corpora those are too alike.)
    """

    def __init__(
        self, shards: list[Tokens], batch_size: int, sequence_length: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.rank, self.world = rank, world
        self._shards = shards
        # the last target of a sequence is one token beyond it
        self._counts = np.array([max(0, len(shard) - 1) // sequence_length for shard in shards], dtype=np.int64)
        self.sequences_per_epoch = int(self._counts.sum())
        if not self.sequences_per_epoch:
            most = max((len(shard) for shard in shards), default=0)
            raise ValueError(
                f"the training split has no {sequence_length + 1} consecutive tokens (its largest shard has {most}): "
                "prepare more data, or lower --sequence-length"
            )
        self._seed = seed
        self._epoch, self._place_in_order = -1, -1
        self._shard_order: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._ends: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._order: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.position = 0  # sequences handed out so far, all processes together

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        return self

    def __next__(self) -> tuple[Batch, Batch]:
        """Inputs and targets, both (batch_size, sequence_length) int64."""
        first = self.position + self.rank * self.batch_size
        windows = np.stack([self._window(index) for index in range(first, first + self.batch_size)])
        self.position += self.world * self.batch_size
        return windows[:, :-1], windows[:, 1:]

    def _window(self, index: int) -> Batch:
        """The sequence at place `index` of the endless order, and one token more."""
        epoch, place = divmod(index, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._shard_order = np.random.RandomState([self._seed, epoch]).permutation(len(self._shards))
            self._ends = np.cumsum(self._counts[self._shard_order])
            self._epoch, self._place_in_order = epoch, -1
        at = int(np.searchsorted(self._ends, place, side="right"))
        shard = int(self._shard_order[at])
        if at != self._place_in_order:
            # RandomState, since numpy promises that its stream never changes
            self._order = np.random.RandomState([self._seed, epoch, shard]).permutation(self._counts[shard])
            self._place_in_order = at
        start = int(self._order[place - int(self._ends[at] - self._counts[shard])]) * self.sequence_length
        return self._shards[shard][start : start + self.sequence_length + 1].astype(np.int64)


class ValidationBatches:
    """The first `batches` batches of the validation split in order (None: all that fit), the same at every validation.

    Attributes:
        tokens, bytes: targets in all batches, and the UTF-8 bytes of text that they stand for, for bits per byte.
    """

    def __init__(self, data: TokenData, batch_size: int, sequence_length: int, *, batches: int | None = None) -> None:
        shards = data.shards("val")
        total = sum(len(shard) for shard in shards)
        if total <= sequence_length:
            raise ValueError(
                f"the validation split has {total} tokens, fewer than one sequence of {sequence_length} + 1: "
                "prepare more data, or lower --sequence-length"
            )
        rows = (total - 1) // sequence_length
        self.batch_size, self.sequence_length = min(batch_size, rows), sequence_length
        available = rows // self.batch_size
        self.batches = available if batches is None else min(batches, available)
        wanted = self.batches * self.batch_size * sequence_length + 1
        stream = (
            np.concatenate([shard[:wanted] for shard in shards])[:wanted] if len(shards) > 1 else shards[0][:wanted]
        )
        self._stream: Tokens = stream
        self.tokens = wanted - 1
        self.bytes = int(data.token_bytes[np.asarray(stream[1:], dtype=np.int64)].sum())

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        """Inputs and targets, both (batch_size, sequence_length) int64."""
        step = self.batch_size * self.sequence_length
        shape = (self.batch_size, self.sequence_length)
        for index in range(self.batches):
            window = self._stream[index * step : (index + 1) * step + 1].astype(np.int64)
            yield window[:-1].reshape(shape), window[1:].reshape(shape)

    def bits_per_byte(self, loss: float) -> float:
        """`loss` is the mean over the batches in nats per token."""
        return float(loss * self.tokens / (np.log(2) * self.bytes))
