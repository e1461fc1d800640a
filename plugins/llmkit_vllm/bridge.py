"""The folder through which vLLM's environment sees a little of ours: nothing is installed there for it.

It goes onto PYTHONPATH and holds the package `llmkit_inside`, the file of the checkpoint's architecture where a plugin
of ours brings it (alone, under its own module name), and metadata with the entry points that vLLM looks for.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.architectures import GROUP, find_architecture, source_file

INSIDE = Path(__file__).parent / "inside"
PLUGIN = "llmkit"


@contextlib.contextmanager
def bridge(config: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder for a checkpoint with this config.json; deleted afterwards.

    Raises ValueError where the module of its architecture cannot be found.
    """
    with tempfile.TemporaryDirectory(prefix="llmkit-vllm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        shutil.copytree(INSIDE, folder / "llmkit_inside", ignore=shutil.ignore_patterns("__pycache__"))
        points = f"[vllm.general_plugins]\n{PLUGIN} = llmkit_inside.plugin:register\n"
        entry = find_architecture(str(config.get("model_type")))
        if entry is not None:
            points += f"[{GROUP}]\n{entry.name} = {entry.value}\n"
            _copy_module(source_file(entry), entry.module, folder)
        metadata = folder / "llmkit_inside-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llmkit_inside\nVersion: 1\n", "utf-8")
        (metadata / "entry_points.txt").write_text(points, "utf-8")
        yield folder


def _copy_module(source: Path, module: str, folder: Path) -> None:
    """A module without its package: the packages above it are empty, since theirs import llmkit."""
    *packages, name = module.split(".")
    for package in packages:
        folder = folder / package
        folder.mkdir()
        (folder / "__init__.py").touch()
    shutil.copyfile(source, folder / f"{name}.py")
