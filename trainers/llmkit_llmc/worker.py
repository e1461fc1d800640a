"""One of several processes, started by `processes` under mpirun: `python -m llmkit_llmc.worker FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint import Checkpoint
from llmkit.data.tokens import TokenData
from llmkit.run import Run
from llmkit.trainer import Saved
from llmkit.training import Plan
from llmkit.weights import Array
from llmkit_llmc.library import load
from llmkit_llmc.loop import Training
from llmkit_llmc.processes import STOP
from llmkit_llmc.state import Comm
from llmkit_llmc.trainer import LlmcConfig, LlmcTrainer


class _StopFile(threading.Event):
    """Set once the launching process has made the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def is_set(self) -> bool:
        return self._path.exists()


class _Handover:
    """The job's `save`: writes this process's part where the launching process picks it up."""

    def __init__(self, folder: Path, comm: Comm) -> None:
        self.folder, self.comm = folder, comm
        self.training: Training | None = None

    def __call__(
        self,
        step: int,
        *,
        config: Mapping[str, Any],
        weights: Mapping[str, Array],
        write_state: Callable[[Path], None],
        val_loss: float | None,
    ) -> Saved:
        assert self.training is not None
        folder = self.folder / f"step_{step}"
        folder.mkdir(exist_ok=True)
        library, model = self.training.library, self.training.model
        write_state(folder)
        if self.comm.rank == 0:
            library.call("llmc_model_write", model.handle, os.fsencode(folder / "model.bin"))
        self.comm.barrier(library)
        report({"event": "save", "step": step}, self.comm)
        return Saved(step, folder)


def report(record: dict[str, Any], comm: Comm) -> None:
    """One line to the launching process, from rank 0."""
    if comm.rank == 0:
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


def main(folder: Path) -> None:
    """Train as the launching process described, and report every event."""
    library = load(mpi=True)
    comm = Comm.open(library)
    try:
        described = json.loads((folder / "job.json").read_text("utf-8"))
        config = LlmcConfig(**described["config"])
        data = TokenData(described["data"])
        start = Checkpoint.open(described["start"]) if described["start"] else None
        save = _Handover(folder, comm)
        plan = Plan(LlmcTrainer, config, data, start, described["resume"], Run(Path(described["out"])))
        training = save.training = Training(plan.job(save, _StopFile(folder / STOP)), comm)
        for event in training.run():
            if not isinstance(event, Saved):
                report({"event": type(event).__name__, **dataclasses.asdict(event)}, comm)
    except (ValueError, OSError) as error:
        print(json.dumps({"event": "error", "text": str(error)}), flush=True)
        library.llmc_comm_abort()
    library.llmc_comm_close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
