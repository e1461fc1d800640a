"""One of several processes, started by `launch`: `python -m llmkit_torch.worker`, with its job on standard input."""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Train as process 0 describes it; it alone shows, records and saves."""
    described = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        train(described)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        from llmkit_torch.launch import LOST, is_lost_contact

        if not is_lost_contact(error):
            raise
        sys.exit(LOST)


def train(described: dict[str, Any]) -> None:
    """Take this process's part in the run. Raises ValueError and OSError as a trainer does."""
    from torch._C._distributed_c10d import TCPStore

    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData
    from llmkit.run import Run
    from llmkit.training import Plan
    from llmkit_torch.launch import joined, own_threads
    from llmkit_torch.processes import Processes, own_device
    from llmkit_torch.trainer import TorchTrainer

    config = find(described["options"])(**described["config"])
    start = Checkpoint.open(described["start"]) if described["start"] else None
    plan = Plan(
        TorchTrainer, config, TokenData(described["data"]), start, described["resume"], Run(Path(described["out"]))
    )
    job = plan.job(save=_refuse, stop=threading.Event())
    rank, count = described["rank"], described["count"]
    processes = Processes(rank, count, rank, count)
    device = own_device(config.device, processes)
    loop = find(described["loop"])
    store = TCPStore("127.0.0.1", described["port"], count, is_master=False, wait_for_workers=False)
    store.set(f"there/{rank}", "")
    with own_threads(config.threads, processes), joined(processes, device, store):
        for _ in loop(job, processes).run():
            pass


def find(name: str) -> Any:
    """The class that `launch.qualified` named."""
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _refuse(step: int, **kwargs: Any) -> NoReturn:
    raise AssertionError("process 0 saves")


def _end_with_parent() -> None:
    """Process 0 holds the other end of this pipe open as long as it lives."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
