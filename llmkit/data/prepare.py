"""Preparation: text sources to a folder of token shards, their tokenizer and meta.json, in bounded memory.

Documents stream from their sources in order, long ones divided into parts, each part then counting as a document.
Batches of about a megabyte go to worker processes and come back in order, and tokens go straight to disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llmkit import __version__, files
from llmkit.component import require
from llmkit.data.encode import Batch, Encoded, Role, encode_all
from llmkit.data.readers import FileSource, open_source
from llmkit.data.shards import ShardInfo, ShardWriter, token_dtype
from llmkit.data.source import DataSource, Text
from llmkit.data.split import split_text
from llmkit.data.tokens import META, META_FORMAT
from llmkit.tokenizer import Tokenizer, find_provider, load_tokenizer

DEFAULT_VOCAB_SIZE = 8192
#: Characters that a tokenizer is trained on at most: more changes its compression by less than a percent.
TRAINING_CHARACTERS = 32 << 20
_BATCH_CHARACTERS = 1 << 20
#: Sources of known size below this are encoded in this process: starting others takes longer than the work.
_SMALL = 4 << 20

#: Beyond this, reading in one process is what takes the time, and every worker takes some 100 MB of memory.
_MOST_WORKERS = 8

#: Called with how much has been read, in [0, 1] or None, and the tokens so far.
Progress = Callable[[float | None, int], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop reading: after this many documents, or after the document that reaches this many tokens."""

    documents: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One document, or part of a long one, on its way to the tokenizer."""

    text: str
    role: Role
    position: float | None


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    val_sources: Sequence[str] = (),
    val_fraction: float = 0.02,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    text_field: str | None = None,
    limits: Limits = Limits(),
    overwrite: bool = False,
    note: Callable[[str], None] = lambda message: None,
    progress: Progress = lambda position, tokens: None,
) -> dict[str, Any]:
    """Make the data folder `out` from sources (see `open_source`); returns the content of its meta.json.

    The validation split is, in this order: `val_sources`, the validation text that a source brings itself, else about
    `val_fraction` of the documents, chosen by a hash of their text. `out` appears when all is done. Raises ValueError
    for unusable text or options, FileExistsError where `out` is there and not to be overwritten.
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already: choose another --out, or replace it with --overwrite")
    if out.exists() and any(out.iterdir()) and not (out / META).is_file():
        raise ValueError(f"{out} is no data folder made by llmkit (it has no {META}), so it is not overwritten")
    opened = [open_source(spec, text_field=text_field) for spec in sources]
    held_out = [open_source(spec, text_field=text_field) for spec in val_sources]

    def parts() -> Iterator[Part]:
        training = islice(_parts(opened, "train" if held_out else "either"), limits.documents)
        return chain(_parts(held_out, "val"), _never_single(training))

    made = _tokenizer(tokenizer, vocab_size, lambda: _training_texts(opened, limits), note)
    dtype = token_dtype(made.vocab_size)
    _remove_leftovers(out)
    with files.new_directory(out, replace=overwrite) as folder:
        made.save(folder / "tokenizer")
        if load_tokenizer(folder / "tokenizer").fingerprint != made.fingerprint:
            raise ValueError(f"tokenizer {made.name!r} does not read back from its own tokenizer.json as it was")
        encoded = encode_all(
            _batches(parts()),
            folder / "tokenizer",
            dtype=dtype,
            val_fraction=val_fraction,
            workers=_worker_count(workers, opened),
        )
        with contextlib.closing(encoded):  # ends the workers before the folder goes, whatever happens
            splits = _write(encoded, folder, dtype, shard_tokens, limits, progress)
        meta = {
            "format": META_FORMAT,
            "llmkit_version": __version__,
            "tokenizer": {
                "name": made.name,
                "vocab_size": made.vocab_size,
                "fingerprint": made.fingerprint,
                "eot_id": made.eot_id,
            },
            "dtype": dtype,
            "sources": list(sources),
            "val_sources": list(val_sources),
            "train": splits["train"].describe(),
            "val": splits["val"].describe(),
            "fingerprint": _fingerprint(made, splits),
        }
        files.write_json(folder / META, meta)
    return meta


def _tokenizer(
    ref: str, vocab_size: int | None, texts: Callable[[], Iterable[str]], note: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer that `ref` names, trained on `texts()` where it is a trainable one."""
    path = Path(ref).expanduser()
    if not path.exists():
        provider = find_provider(ref)
        require(provider.requires, f"tokenizer {ref!r}")
        if provider.trainable:
            size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
            note(f"training tokenizer {ref!r} with a vocabulary of {size}")
            trained = provider.train(texts(), vocab_size=size, special_tokens=())
            if trained.vocab_size < size and ref == "bpe":
                note(f"the text has no more than {trained.vocab_size} tokens to offer; that is the vocabulary now")
            return trained
    if vocab_size is not None:
        raise ValueError(f"--vocab-size is for a tokenizer that is trained on the data; {ref!r} is a finished one")
    return load_tokenizer(ref)


def _training_texts(sources: Sequence[DataSource], limits: Limits) -> Iterator[str]:
    """A bounded sample of the sources, an equal share of each, to train a tokenizer on."""
    share = TRAINING_CHARACTERS // len(sources)
    documents = limits.documents
    for source in sources:
        left = share
        stream = source.sample(share) if isinstance(source, FileSource) and not documents else source.documents()
        for document in stream:
            for part in split_text(document.text):
                if documents is not None:
                    if documents <= 0:
                        return
                    documents -= 1
                yield part
                left -= len(part)
            if left <= 0:
                break


def _parts(sources: Sequence[DataSource], role: Role) -> Iterator[Part]:
    """All documents of the sources, long ones divided; with the role `either`, a source's own validation text first."""
    weights = _weights(sources)
    done = 0.0
    for source, weight in zip(sources, weights):
        own = source.validation_documents() if role == "either" else None
        streams: list[tuple[Iterator[Text], Role]] = [(source.documents(), role)]
        if own is not None:
            streams = [(own, "val"), (source.documents(), "train")]
        for documents, stream_role in streams:
            for document in documents:
                known = document.position is not None and stream_role == role
                position = done + weight * (document.position or 0.0) if known else None
                for text in split_text(document.text):
                    yield Part(text, stream_role, position)
        done += weight


def _weights(sources: Sequence[DataSource]) -> list[float]:
    """Each source's share of the work: by size where all are files, else equal."""
    sizes = [float(source.size) if isinstance(source, FileSource) else 0.0 for source in sources]
    if not all(sizes):
        sizes = [1.0] * len(sources)
    return [size / sum(sizes) for size in sizes]


def _never_single(parts: Iterator[Part]) -> Iterator[Part]:
    """The parts; one that is the only one is divided, so that there is something to train and to validate on."""
    ahead = list(islice(parts, 2))
    if len(ahead) == 1 and ahead[0].role == "either" and len(ahead[0].text) > 1:
        text = ahead[0].text
        earliest, target = len(text) // 2, max(len(text) * 9 // 10, 1)
        newline = text.rfind("\n", earliest, target)
        cut = newline + 1 if newline >= 0 else target
        ahead = [Part(text[:cut], "either", None), Part(text[cut:], "either", ahead[0].position)]
    return chain(ahead, parts)


def _batches(parts: Iterable[Part]) -> Iterator[Batch]:
    """Parts of one role together, about _BATCH_CHARACTERS each."""
    texts: list[str] = []
    held = 0
    last: Part | None = None
    for part in parts:
        if last is not None and (held >= _BATCH_CHARACTERS or part.role != last.role):
            yield Batch(texts, last.role, last.position)
            texts, held = [], 0
        texts.append(part.text)
        held += len(part.text)
        last = part
    if last is not None:
        yield Batch(texts, last.role, last.position)


def _worker_count(workers: int | None, sources: Sequence[DataSource]) -> int:
    if workers is not None:
        return workers
    sizes = [source.size if isinstance(source, FileSource) else _SMALL for source in sources]
    if sum(sizes) < _SMALL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


class _Split:
    """One split as it is written: its shards, counts and a running hash of its tokens."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self._writer = ShardWriter(folder, name, dtype, shard_tokens)
        self._little_endian = np.dtype(dtype).newbyteorder("<")
        self.hash = hashlib.blake2b(digest_size=16)
        self.documents = self.bytes = self.tokens = 0
        self.shards: list[ShardInfo] = []

    def add(self, encoded: Encoded, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        tokens = encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, encoded.counts)]
        self._writer.write(tokens)
        self.hash.update(tokens.astype(self._little_endian, copy=False).tobytes())
        self.tokens += len(tokens)
        self.documents += int(chosen.sum())
        self.bytes += int(encoded.sizes[chosen].sum())

    def close(self) -> None:
        self.shards = self._writer.close()

    def describe(self) -> dict[str, Any]:
        shards = [{"name": shard.name, "tokens": shard.tokens} for shard in self.shards]
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "shards": shards}


def _write(
    encoded: Iterable[tuple[Batch, Encoded]],
    folder: Path,
    dtype: str,
    shard_tokens: int,
    limits: Limits,
    progress: Progress,
) -> dict[str, _Split]:
    """Write all batches to the shards of both splits.

    Neither split stays empty: the first document trains, and the last one validates where no other does; for that, a
    batch is held back until the next one is there. Raises ValueError where there is too little text for two splits.
    """
    train, val = (_Split(folder, name, dtype, shard_tokens) for name in ("train", "val"))
    held: Encoded | None = None

    def write(part: Encoded) -> None:
        for split, chosen in ((train, ~part.validation), (val, part.validation)):
            if chosen.any():
                split.add(part, chosen)

    chosen_by_hash = False
    tokens = 0
    for batch, part in encoded:
        if limits.tokens is not None and batch.role != "val":
            reached = int(np.searchsorted(np.cumsum(part.counts), limits.tokens - tokens)) + 1
            part = part.first(max(reached, 1 if chosen_by_hash else 2))
        if batch.role == "either" and not chosen_by_hash:
            part.validation[0] = False
            chosen_by_hash = True
        if batch.role != "val":
            tokens += len(part.tokens)
        if held is not None:
            write(held)
        held = part
        progress(batch.position, tokens)
        if limits.tokens is not None and tokens >= limits.tokens:
            break
    if held is not None:
        if chosen_by_hash and not val.tokens and not held.validation.any():
            held.validation[-1] = True
        write(held)
    train.close()
    val.close()
    for name, split in (("train", train), ("validate", val)):
        if not split.tokens:
            raise ValueError(f"there is no text to {name} on: the source is empty or too short")
    return {"train": train, "val": val}


def _fingerprint(tokenizer: Tokenizer, splits: dict[str, _Split]) -> str:
    digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    for name in ("train", "val"):
        digest.update(splits[name].hash.digest())
    return digest.hexdigest()


def _remove_leftovers(out: Path) -> None:
    """Delete what a killed preparation of the same folder left beside it."""
    for path in out.parent.glob(f"{files.TEMPORARY}*-{out.name}"):
        pid = path.name.removeprefix(files.TEMPORARY).split("-", 1)[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True
