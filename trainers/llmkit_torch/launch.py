"""Launch: a run in as many processes as were asked for, and how they end together.

`--nproc N` starts N - 1 workers beside this process, which stays process 0 and so shows, records and saves as ever.
Under torchrun every process is one of the run already. It could start those of `--nproc` too, but on Ctrl-C it signals
its processes a second time and kills those that still save after 30 seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from llmkit.checkpoint import complete_checkpoints
from llmkit.torchrun import Torchrun
from llmkit.trainer import Event, TrainJob
from llmkit_torch.loop import TrainingLoop
from llmkit_torch.processes import ALONE, Processes, check_agreement, check_batches, own_device

LOST = 75  # exit status of a worker that ended because another process had
POLL_SECONDS = 0.05
NOTICE_SECONDS = 10.0  # that this process gets to notice itself that a worker has died


def run(job: TrainJob, loop: type[TrainingLoop]) -> Iterator[Event]:
    """The events of a run. Raises ValueError where the processes cannot share it, or one of them has died."""
    started = Torchrun.from_environment()
    count = started.world if started else job.config.nproc
    check_batches((loop.micro_batches_at(step, job.config) for step in range(job.config.steps)), count)
    if started:
        yield from _under_torchrun(job, loop, Processes(*dataclasses.astuple(started)))
    elif count > 1:
        yield from _with_workers(job, loop, Processes(0, count, 0, count))
    else:
        if job.config.fsdp:  # of a resumed run: a new one is refused
            job = dataclasses.replace(job, config=dataclasses.replace(job.config, fsdp=False))
        with own_threads(job.config.threads, ALONE):
            yield from loop(job).run()


@contextlib.contextmanager
def own_threads(threads: int | None, processes: Processes) -> Iterator[None]:
    """Give this process its share of the processor, unless the user has said how much."""
    before = torch.get_num_threads()
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, before // processes.local_count)
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def joined(processes: Processes, device: torch.device, store: Store | None) -> Iterator[None]:
    """As a member of the process group: gloo for what lies on the CPU, NCCL for CUDA. No store: torchrun's."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    place: dict[str, Any] = {} if store is None else {
        "store": store, "rank": processes.rank, "world_size": processes.count
    }  # fmt: skip
    with _loopback() if processes.local_count == processes.count else contextlib.nullcontext():
        dist.init_process_group(backend, **place)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo use the machine's own interface: by default it takes that of the host's name, which need not resolve.

    FSDP makes groups of its own later, so this holds throughout.
    """
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ:
        yield
        return
    os.environ[name] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _under_torchrun(job: TrainJob, loop: type[TrainingLoop], processes: Processes) -> Iterator[Event]:
    device = own_device(job.config.device, processes)
    with own_threads(job.config.threads, processes), joined(processes, device, None):
        check_agreement(job)
        try:
            yield from loop(job, processes).run()
        except RuntimeError as error:
            if not is_lost_contact(error):
                raise
            raise ValueError(f"process {processes.rank} has lost another process of the run; {advice(job)}") from error


def _with_workers(job: TrainJob, loop: type[TrainingLoop], processes: Processes) -> Iterator[Event]:
    device = own_device(job.config.device, processes)
    store = TCPStore("127.0.0.1", 0, processes.count, is_master=True, wait_for_workers=False)
    workers = Workers(job, loop, processes.count, store.port)
    with own_threads(job.config.threads, processes), workers:
        workers.wait_for(store)
        with joined(processes, device, store), workers.watched(device):
            try:
                yield from loop(job, processes).run()
            except RuntimeError as error:
                if is_lost_contact(error) and (cause := workers.failure(NOTICE_SECONDS)):
                    raise ValueError(cause) from error
                raise
        workers.finish()


class Workers:
    """The other processes of a run on this machine. None outlives this process, however that ends: when the pipe to
    its standard input closes, a worker exits.
    """

    def __init__(self, job: TrainJob, loop: type[TrainingLoop], count: int, port: int) -> None:
        self.job, self.count = job, count
        self.described = {**describe(job), "loop": qualified(loop), "count": count, "port": port}
        self.processes: list[subprocess.Popen[str]] = []
        self.said: list[list[str]] = []

    def __enter__(self) -> Workers:
        paths = [*(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        for rank in range(1, self.count):
            process = subprocess.Popen(
                [sys.executable, "-m", "llmkit_torch.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which tells the others
            )
            assert process.stdin is not None and process.stderr is not None
            with contextlib.suppress(BrokenPipeError):  # a worker that has died is found by `failure`
                process.stdin.write(json.dumps({**self.described, "rank": rank}) + "\n")
                process.stdin.flush()
            said: list[str] = []
            threading.Thread(target=_collect, args=(process.stderr, said), daemon=True).start()
            self.processes.append(process)
            self.said.append(said)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for(self, store: Store) -> None:
        """Wait until all workers are there. Raises ValueError where one has died instead."""
        names = [f"there/{rank}" for rank in range(1, self.count)]
        while not store.check(names):
            if cause := self.failure():
                raise ValueError(cause)
            time.sleep(POLL_SECONDS)

    def finish(self) -> None:
        """Let the workers end by themselves after the last step."""
        deadline = time.monotonic() + NOTICE_SECONDS
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def failure(self, seconds: float = 0.0) -> str | None:
        """Which worker died and why, waiting so long for one to; None where all live.

        Those that ended because another one had are no cause.
        """
        deadline = time.monotonic() + seconds
        while True:
            dead = [(i, p.returncode) for i, p in enumerate(self.processes) if p.poll() not in (None, 0, LOST)]
            if dead:
                index, status = min(dead, key=lambda item: item[1])  # negative: killed by a signal
                return self._describe(index, status)
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)

    def _describe(self, index: int, status: int) -> str:
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            time.sleep(POLL_SECONDS)  # for what it said last
            how = f"ended with status {status}: {' / '.join(self.said[index][-3:]) or 'it said nothing'}"
        return f"process {index + 1} of the {self.count} of this run {how}; {advice(self.job)}"

    @contextlib.contextmanager
    def watched(self, device: torch.device) -> Iterator[None]:
        """On CUDA, end this process some seconds after a worker died: NCCL would wait for it for minutes."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(POLL_SECONDS):
                if (cause := self.failure()) and not done.wait(NOTICE_SECONDS):
                    os.write(2, f"\nllmkit: error: {cause}\n".encode())
                    os._exit(1)

        if device.type == "cuda":
            threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()


def describe(job: TrainJob) -> dict[str, Any]:
    """What a worker needs to make the same job."""
    return {
        "config": dataclasses.asdict(job.config),
        "options": qualified(type(job.config)),
        "data": str(job.data.path.resolve()),
        "start": None if job.start is None else str(job.start.path.resolve()),
        "resume": job.resume,
        "out": str(job.out.resolve()),
    }


def qualified(cls: type) -> str:
    """How a worker finds a class: `package.module:Name`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def advice(job: TrainJob) -> str:
    """How to go on after a process has died."""
    saved: list[Path] = complete_checkpoints(job.out)
    if not saved:
        return "nothing had been saved yet"
    return f"the others have ended too; {saved[-1].name} is saved, continue with: llmkit train --resume --out {job.out}"


def is_lost_contact(error: BaseException) -> bool:
    """Is this what gloo or NCCL raise when another process has gone? They have no class of their own for it."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL", "Connection"))


def _collect(lines: IO[str], said: list[str]) -> None:
    for line in lines:
        said.append(line.strip())
        del said[:-20]
