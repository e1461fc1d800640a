"""Several processes: starts workers under mpirun and turns what rank 0 reports back into the events of one run.

A worker runs the same loop as a single process. Rank 0 writes each event as one line of JSON on stdout; a checkpoint
passes through a folder in the run directory, and this process saves it as any other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmkit.files import TEMPORARY, write_json
from llmkit.gpt2 import GPT2Config, from_llmc
from llmkit.llmc_files import read_model
from llmkit.trainer import Evaluation, Event, Finished, Note, Sample, Started, Step, TrainJob, Validation
from llmkit_llmc.build import BuildError, build

EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Started, Step, Validation, Evaluation, Sample, Note, Finished)
}
STOP = "stop"  # the file that tells the workers to save and finish
POLL_SECONDS = 0.2


def launcher() -> str:
    """mpirun, preferably the one beside the compiler that built the library. Raises BuildError where there is none."""
    compiler = os.environ.get("LLMC_MPICC") or shutil.which("mpicc")
    places = [str(Path(compiler).parent)] if compiler else []
    for path in (*places, None, str(Path(sys.executable).parent)):
        if found := shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path):
            return found
    raise BuildError("there is no mpirun: several processes need MPI (Debian: apt install mpich; or pip install mpich)")


def train(job: TrainJob) -> Iterator[Event]:
    """The events of a run in `job.config.nproc` processes. BuildError without MPI; ValueError where a worker failed."""
    build(mpi=True)  # once, before all workers ask for it
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}llmc-", dir=job.out))
    try:
        write_json(folder / "job.json", describe(job))
        yield from _run(job, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe(job: TrainJob) -> dict[str, Any]:
    """What a worker needs to make the same job."""
    return {
        "config": dataclasses.asdict(job.config),
        "data": str(job.data.path.resolve()),
        "start": None if job.start is None else str(job.start.path.resolve()),
        "resume": job.resume,
        "out": str(job.out.resolve()),
    }


def _run(job: TrainJob, folder: Path) -> Iterator[Event]:
    command = [launcher(), "-np", str(job.config.nproc)]
    if "open" in _version(command[0]).lower():
        command += ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")]),
    }
    worker = [sys.executable, "-m", "llmkit_llmc.worker", str(folder)]
    process = subprocess.Popen(
        [*command, *worker],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the workers to finish
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(job.stop, done, folder), daemon=True)
    watcher.start()
    tail: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    reader = threading.Thread(target=_collect, args=(process.stderr, tail), daemon=True)
    reader.start()
    try:
        yield from _events(job, process.stdout, folder)
        status = process.wait()
        reader.join()
        if status:
            raise ValueError(f"a worker ended with status {status}: {' / '.join(tail[-3:]) or 'it said nothing'}")
    finally:
        done.set()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _events(job: TrainJob, lines: IO[str], folder: Path) -> Iterator[Event]:
    last_val: float | None = None
    for line in lines:
        if not line.startswith("{"):
            continue  # a launcher's own remark
        record = json.loads(line)
        kind = record.pop("event")
        if kind == "error":
            raise ValueError(record["text"])
        if kind == "save":
            yield _save(job, folder / f"step_{record['step']}", record["step"], last_val)
            continue
        event = EVENTS[kind](**record)
        if isinstance(event, Validation):
            last_val = event.loss
        yield event


def _save(job: TrainJob, handed: Path, step: int, val_loss: float | None) -> Event:
    """Save what the workers handed over, as this process's checkpoint."""
    shape, arrays = read_model(handed / "model.bin")

    def write_state(target: Path) -> None:
        for path in sorted(handed.glob("state_*.bin")):
            shutil.move(path, target / path.name)

    try:
        config = GPT2Config.to_hf(shape, eot_id=job.data.eot_id)
        weights = from_llmc({name: np.asarray(array) for name, array in arrays.items()}, shape)
        return job.save(step, config=config, weights=weights, write_state=write_state, val_loss=val_loss)
    finally:
        shutil.rmtree(handed, ignore_errors=True)


def _watch(stop: threading.Event, done: threading.Event, folder: Path) -> None:
    while not done.is_set():
        if stop.wait(POLL_SECONDS):
            (folder / STOP).touch()
            return


def _collect(lines: IO[str], tail: list[str]) -> None:
    for line in lines:
        tail.append(line.strip())
        del tail[:-20]


def _version(mpirun: str) -> str:
    answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return (answer.stdout + answer.stderr).splitlines()[0] if answer.stdout + answer.stderr else ""
