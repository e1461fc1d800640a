"""Run: the directory of one training run.

config.json     backend, options, data, llmkit's version
metrics.jsonl   one JSON object for each step, validation and sample
main.log        the same in llm.c's format
checkpoints/    step_N/, each a complete checkpoint
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llmkit.checkpoint import complete_checkpoints, save_checkpoint
from llmkit.files import TEMPORARY, remove_leftovers, write_json, write_text
from llmkit.tokenizer import Tokenizer
from llmkit.trainer import Saved
from llmkit.weights import Array

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOG = "main.log"


class Run:
    """A run directory, held by one process at a time while it is open for training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._log: IO[str] | None = None

    @property
    def exists(self) -> bool:
        return (self.path / CONFIG).is_file()

    @property
    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first."""
        return complete_checkpoints(self.path)

    def config(self) -> dict[str, Any]:
        """What config.json says. Raises ValueError where it is missing or damaged."""
        try:
            config: dict[str, Any] = json.loads((self.path / CONFIG).read_text("utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not a training run: it has no {CONFIG}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path / CONFIG} is damaged: {error}") from None
        if "backend" not in config:
            raise ValueError(f"{self.path} is not a training run: its {CONFIG} names no backend")
        return config

    def acquire(self) -> None:
        """Take the run for this process. Raises ValueError where another process is training in it."""
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {self.path}") from None
        remove_leftovers(self.path / "checkpoints")
        remove_leftovers(self.path)

    def begin(self, config: Mapping[str, Any], *, step: int) -> None:
        """Write config.json and open the logs; entries from `step` steps on, of a run that was cut off, are dropped."""
        write_json(self.path / CONFIG, config)
        metrics, log = self.path / METRICS, self.path / LOG
        if metrics.exists():
            kept = [line for line, record in _records(metrics) if _keep(record["kind"], record["step"], step)]
            write_text(metrics, "".join(kept))
        if log.exists():
            kept = []
            for line in log.read_text("utf-8").splitlines(keepends=True):
                match = re.match(r"s:(\d+) (\w+):", line)
                if (
                    match
                    and line.endswith("\n")
                    and _keep("step" if match[2] == "trl" else match[2], int(match[1]), step)
                ):
                    kept.append(line)
            write_text(log, "".join(kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._log = log.open("a", encoding="utf-8")

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append to metrics.jsonl."""
        assert self._metrics is not None
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=False, ensure_ascii=False)
        self._metrics.write(line + "\n")
        self._metrics.flush()

    def log(self, line: str) -> None:
        """Append to main.log."""
        assert self._log is not None
        self._log.write(line + "\n")
        self._log.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far, in order."""
        path = self.path / METRICS
        return [record for _, record in _records(path)] if path.is_file() else []

    def save(
        self,
        step: int,
        *,
        config: Mapping[str, Any],
        weights: Mapping[str, Array],
        tokenizer: Tokenizer,
        provenance: Mapping[str, Any],
        write_state: Callable[[Path], None],
        keep_last: int,
        keep_every: int = 0,
    ) -> Saved:
        """Save checkpoints/step_N, then remove the oldest beyond `keep_last` (0 keeps all). Raises OSError.

        Those whose step is a multiple of `keep_every` stay (0: none of them).
        """
        path = self.path / "checkpoints" / f"step_{step}"
        from safetensors import SafetensorError

        try:
            save_checkpoint(
                path,
                config=config,
                weights=weights,
                tokenizer=tokenizer,
                provenance=provenance,
                write_state=write_state,
                replace=True,
            )
        except (OSError, SafetensorError) as error:  # the library's name for a full disk
            before = self.checkpoints
            kept = f"the newest complete checkpoint is {before[-1]}" if before else "there is no checkpoint yet"
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"saving step {step} failed: {reason}; {kept}") from error
        for old in self.checkpoints[:-keep_last] if keep_last else []:
            if old == path or (keep_every and int(old.name.removeprefix("step_")) % keep_every == 0):
                continue
            doomed = old.with_name(f"{TEMPORARY}old-{old.name}")  # renamed first: a half-deleted one must not be opened
            old.rename(doomed)
            shutil.rmtree(doomed)
        return Saved(step, path)

    def close(self) -> None:
        for file in (self._metrics, self._log, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._log = self._lock = None


def _keep(kind: str, at: int, step: int) -> bool:
    """Does a record belong to the first `step` steps? Step records count from 0, the others say how many are done."""
    return at < step if kind == "step" else at <= step


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines of a metrics file; a last line that was cut off in the middle is left out."""
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        yield line, json.loads(line)
