"""AnswerCache: answers of a model kept on disk, so that an evaluation goes on where it was stopped.

There is one SQLite file for each model, named by the content of its files and by what runs it; in it, the key of an
answer is the request in token ids with all its parameters. So prompts, tasks and their versions need no place in the
key: what is asked is in the ids, and scores are worked out anew from the answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import struct
import sys
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import __version__
from llmkit.evaluator import Answer, Likelihood
from llmkit.files import cache_dir, write_text

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.engine import Engine, Sampling

MAX_BYTES = 2 * 2**30  # of all files together; the longest unused go first
MIN_AGE = 24 * 3600  # seconds; a file that was opened since may be in use
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors")

Ids = tuple[int, ...]


class AnswerCache:
    """Request key -> answer. Safe to share between processes; each answer is on its own as soon as `put` returns."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or sqlite3.Error where the file cannot be used; a damaged one is begun anew, with a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._db = _open(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            print(f"llmkit: {path} is damaged ({error}) and is begun anew", file=sys.stderr)
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                path.with_name(name).unlink(missing_ok=True)
            self._db = _open(path)
        os.utime(path)
        self._writes = True

    def get(self, key: bytes) -> Answer | None:
        row = self._db.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
        if row is None:
            return None
        value = json.loads(row[0])
        return value if isinstance(value, str) else Likelihood(*value)

    def put(self, key: bytes, answer: Answer) -> None:
        """Keep an answer. Where the disk is full nothing more is kept, with a line saying so."""
        if not self._writes:
            return
        value = answer if isinstance(answer, str) else [answer.logprob, answer.is_greedy, answer.tokens]
        try:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))
        except sqlite3.OperationalError as error:
            self._writes = False
            print(f"llmkit: no more answers are kept in {self.path}: {error}", file=sys.stderr)

    def close(self) -> None:
        self._db.close()


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30, isolation_level=None)  # each statement is a transaction
    try:
        db.execute("PRAGMA journal_mode = WAL")  # survives kill -9 without a flush to disk for each answer
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS answers (request BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")
    except BaseException:
        db.close()
        raise
    return db


def open_cache(checkpoint: Checkpoint, engine: Engine, options: Mapping[str, Any]) -> AnswerCache | None:
    """The cache for a model in an engine opened with `options`; None, with a line on stderr, where none can be had."""
    path = cache_dir() / "eval" / f"{model_key(checkpoint, engine, options)}.sqlite"
    try:
        cache = AnswerCache(path)
    except (OSError, sqlite3.Error) as error:
        print(f"llmkit: answers are not kept, so a stopped run begins anew: {path}: {error}", file=sys.stderr)
        return None
    _prune(path)
    return cache


def model_key(checkpoint: Checkpoint, engine: Engine, options: Mapping[str, Any]) -> str:
    """A hash of all that an answer depends on besides the request: the model's files, the engine and its options."""
    files = sorted({path for pattern in MODEL_FILES for path in checkpoint.path.glob(pattern)})
    runs = [engine.name, engine.dtype, engine.identity, sorted(options.items()), __version__]
    content = [[path.name, file_digest(path)] for path in files]
    return hashlib.blake2b(json.dumps([content, runs], default=str).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's content, read once as long as its place, size and time of change are the same."""
    stat = path.stat()
    seen = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    known = cache_dir() / "digests" / hashlib.blake2b(seen.encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        if digest := known.read_text("ascii"):
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    with contextlib.suppress(OSError):
        write_text(known, digest)
    return digest


def score_key(context: Ids, continuation: Ids) -> bytes:
    """The key of a log-likelihood."""
    ids = array("I", context + continuation).tobytes()
    return hashlib.blake2b(struct.pack("<cQ", b"s", len(context)) + ids, digest_size=16).digest()


def text_key(prompt: Ids, stop: tuple[str, ...], sampling: Sampling) -> bytes:
    """The key of a generated text."""
    asked = json.dumps([prompt, stop, asdict(sampling)], sort_keys=True)
    return hashlib.blake2b(b"g" + asked.encode(), digest_size=16).digest()


def _prune(keep: Path) -> None:
    """Remove what was not used for longest until the rest is within MAX_BYTES."""
    found = []
    for path in keep.parent.glob("*.sqlite"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for opened, size, path in sorted(found):
        if total <= MAX_BYTES or time.time() - opened < MIN_AGE:
            return
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)
        total -= size
