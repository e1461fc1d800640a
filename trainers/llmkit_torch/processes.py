"""Processes: those that train one run together, and what they tell each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmkit.trainer import TrainJob
from llmkit_torch.hardware import pick_device

# PyTorch 2.13 renamed them, and warns about the old names.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: options that may differ from process to process
OWN_OPTIONS = ("device", "threads")


@dataclass(frozen=True)
class Processes:
    """This process, `rank` of `count`; `local_rank` of `local_count` on this machine. Alone, it asks nobody."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each; written into `tensor`."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, likewise."""
        return self.sum(tensor).div_(self.count) if self.count > 1 else tensor

    def any(self, value: bool) -> bool:
        """Is it true in some process? Told through the CPU, so that no device has to be waited for."""
        return bool(self.sum(torch.tensor(int(value)))) if self.count > 1 else value

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """rows (count, N): the sum over all processes of row number `rank`, (N,)."""
        row = torch.empty_like(rows[0])
        _reduce_scatter(row, rows.view(-1))
        return row

    def all_gather(self, row: Tensor) -> Tensor:
        """row (N,) of each process: all of them (count, N)."""
        rows = row.new_empty(self.count, row.numel())
        _all_gather(rows.view(-1), row)
        return rows

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What each process gave, in process 0; nothing in the others."""
        if self.rank:
            dist.send(torch.tensor(len(data)), 0)
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
            return []
        gathered = [data]
        for rank in range(1, self.count):
            size = torch.tensor(0)
            dist.recv(size, rank)
            received = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(received, rank)
            gathered.append(received.numpy().tobytes())
        return gathered


ALONE = Processes()


def own_device(name: str | None, processes: Processes) -> torch.device:
    """The device of this process. Raises ValueError where there are not enough of them."""
    device = pick_device(name)
    if processes.count == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(f"--device {device} is one device, for {processes.local_count} processes: use cuda or cpu")
    if processes.local_count > torch.cuda.device_count():
        raise ValueError(
            f"{processes.local_count} processes need as many GPUs, and there are {torch.cuda.device_count()}: "
            "lower --nproc, or use --device cpu"
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


def check_batches(micro_batches: Iterable[int], processes: int) -> None:
    """Raise ValueError unless the micro-batches of every step can be shared out evenly."""
    for count in sorted(set(micro_batches)):
        if count % processes:
            raise ValueError(
                f"a step of {count} micro-batches does not divide into {processes} processes: choose --nproc, "
                "--batch-size and --total-batch-tokens so that it does"
            )


def check_agreement(job: TrainJob) -> None:
    """Raise ValueError, naming the process, where one has been started with other options, data or checkpoint."""
    options = {name: value for name, value in dataclasses.asdict(job.config).items() if name not in OWN_OPTIONS}
    start = job.start.step if job.start and job.resume else None
    mine = {"the data": job.data.fingerprint, "the step to resume from": start, **options}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                raise ValueError(
                    f"{name.replace('_', '-')}: process {rank} has {value}, and process 0 {everyone[0][name]}; all "
                    "need the same command, and a file system that holds the same data and run"
                )
