"""The index of lm-eval's tasks: name -> where it is defined. Kept in a file, since lm-eval takes seconds to make it."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.files import cache_dir, write_text


class Entry(NamedTuple):
    """A name in lm-eval: `kind` is TASK, PY_TASK, GROUP or TAG; `file` is its YAML, relative to lm-eval's tasks."""

    kind: str
    file: str | None
    members: tuple[str, ...]  # of a tag


@cache
def load_index() -> dict[str, Entry]:
    """All names of the lm-eval that is installed, without importing it where they are known from before."""
    kept = cache_dir() / "lm_eval" / f"tasks-{version('lm_eval')}-{_state()}.json"
    if not kept.is_file():
        print(f"llmkit: reading the names of lm-eval's tasks, once (kept in {kept.parent})", file=sys.stderr)
        write_text(kept, json.dumps(_build()))
    found: dict[str, list[Any]] = json.loads(kept.read_text("utf-8"))
    return {name: Entry(kind, file, tuple(members)) for name, (kind, file, members) in found.items()}


def tasks_folder() -> Path:
    """Where lm-eval's YAML files are."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None  # the family's `requires` were checked
    return Path(spec.origin).parent / "tasks"


def _state() -> str:
    """Changes when tasks are added to the installed package, as in a checkout of lm-eval."""
    root = tasks_folder()
    folders = sorted((str(path), path.stat().st_mtime_ns) for path in [root, *root.iterdir()] if path.is_dir())
    return hashlib.blake2b(json.dumps(folders).encode(), digest_size=6).hexdigest()


def _build() -> dict[str, Entry]:
    from lm_eval.tasks._index import TaskIndex

    root = tasks_folder()
    index = TaskIndex.build([root])  # reads YAML alone: no task's code is run
    return {
        name: Entry(
            entry.kind.name,
            str(entry.yaml_path.resolve().relative_to(root.resolve())) if entry.yaml_path else None,
            tuple(sorted(entry.tags)) if entry.kind.name == "TAG" else (),
        )
        for name, entry in index.items()
    }
