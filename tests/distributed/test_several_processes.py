"""Several processes train one run: the same losses, any number to resume with, and they end together."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from llmkit.checkpoint import Checkpoint  # noqa: E402
from llmkit.data.tokens import TokenData  # noqa: E402
from llmkit.run import Run  # noqa: E402
from llmkit.testing.tiny import tiny_data  # noqa: E402
from llmkit.torchrun import Torchrun  # noqa: E402
from llmkit.trainer import Note, Trainer  # noqa: E402
from llmkit.training import Progress, plan, train  # noqa: E402
from llmkit_speedrun import SpeedrunTrainer  # noqa: E402
from llmkit_torch import TorchTrainer  # noqa: E402

#: three matrices a layer of another shape, odd rows, clipping: what the sharing out has to get right
OPTIONS: dict[str, Any] = {
    "depth": 2,
    "width": 32,
    "heads": 2,
    "sequence_length": 32,
    "batch_size": 2,
    "total_batch_tokens": 256,
    "steps": 6,
    "dtype": "fp32",
    "device": "cpu",
    "warmup_steps": 0,
    "grad_clip": 0.9,
    "val_every": 3,
    "val_batches": 3,
    "sample_every": 0,
    "checkpoint_every": 3,
    "keep_last": 0,
}
TRAINERS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "torch": (TorchTrainer, {"learning_rate": 1e-2}),
    "speedrun": (SpeedrunTrainer, {"learning_rate": 2e-2, "normuon": True, "weight_decay": 0.1}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return tiny_data(tmp_path_factory.mktemp("several") / "data")


def run(data: TokenData, backend: str, out: Path, *, resume: bool = False, **changes: Any) -> Run:
    """Train in this process and, with `nproc`, in workers of it."""
    trainer, own = TRAINERS[backend]
    options = changes if resume else {**OPTIONS, **own, **changes}
    events: list[Progress] = []
    train(plan(trainer, options, data=data.path, out=out, resume=resume), events.append)
    assert not any(isinstance(progress.event, Note) for progress in events)
    return Run(out)


def losses(run: Run) -> dict[tuple[str, int], tuple[float, ...]]:
    """(kind, step) -> what was measured there."""
    names = ("loss", "grad_norm", "learning_rate", "tokens", "bpb")
    return {(r["kind"], r["step"]): tuple(r[name] for name in names if name in r) for r in run.metrics()}


def weights(run: Run) -> dict[str, Any]:
    return dict(Checkpoint.open(run.path).weights)


def state(run: Run) -> dict[str, Any]:
    from safetensors.numpy import load_file

    folder = Checkpoint.open(run.path).trainer_state
    assert folder is not None
    return load_file(folder / "optimizer.safetensors")


def assert_same_run(one: Run, two: Run, *, tolerance: float) -> None:
    """The same metrics, weights and optimiser state."""
    assert losses(one).keys() == losses(two).keys()
    for key, values in losses(one).items():
        assert losses(two)[key] == pytest.approx(values, abs=1e-5), key
    for a, b in ((weights(one), weights(two)), (state(one), state(two))):
        assert {name: array.shape for name, array in a.items()} == {name: array.shape for name, array in b.items()}
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "llmkit", "train", *map(str, args)]


def flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]


def main_log(run: Run) -> str:
    """Without the last digits of rates and norms, which the order of sums may change."""
    return re.sub(r" lr:.*", "", (run.path / "main.log").read_text())


# --- the same run in two processes as in one, and on from either


@pytest.fixture(scope="module", params=TRAINERS)
def pair(request: pytest.FixtureRequest, data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Backend, and its runs in one and in two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run(data, request.param, folder / "one"), run(data, request.param, folder / "two", nproc=2)


def cut_off(whole: Run, out: Path) -> Path:
    """A copy of a run without its last checkpoint, to be resumed with the same schedule."""
    shutil.copytree(whole.path, out)
    shutil.rmtree(out / "checkpoints" / "step_6")
    return out


def test_two_processes_train_as_one_and_either_resumes_the_other(data: TokenData, tmp_path: Path, pair: Any) -> None:
    backend, one, two = pair
    assert_same_run(one, two, tolerance=2e-5)
    for first, then in ((one, 2), (two, 1)):
        out = cut_off(first, tmp_path / str(then))
        assert_same_run(one, run(data, backend, out, resume=True, nproc=then), tolerance=2e-5)


def test_the_same_number_resumes_to_the_same_bits(data: TokenData, tmp_path: Path, pair: Any) -> None:
    backend, _, two = pair
    resumed = run(data, backend, cut_off(two, tmp_path / "cut"), resume=True)  # it knows that there were two
    assert losses(two) == losses(resumed)
    for name, array in weights(two).items():
        assert np.array_equal(array, weights(resumed)[name]), name


@pytest.mark.parametrize("backend", TRAINERS)
def test_fsdp_trains_as_one_process_and_resumes_without(data: TokenData, tmp_path: Path, backend: str) -> None:
    one = run(data, backend, tmp_path / "one", sample_every=3)
    two = run(data, backend, tmp_path / "two", sample_every=3, nproc=2, fsdp=True)
    samples = [[r["text"] for r in each.metrics() if r["kind"] == "sample"] for each in (one, two)]
    assert samples[0] == samples[1]
    assert_same_run(one, two, tolerance=2e-5)
    for then in (1, 2):
        out = cut_off(two, tmp_path / str(then))
        assert_same_run(one, run(data, backend, out, resume=True, nproc=then), tolerance=2e-5)


# --- torchrun


def test_under_torchrun_only_the_first_process_speaks_and_records(data: TokenData, tmp_path: Path) -> None:
    one = run(data, "torch", tmp_path / "one")
    options = flags({**OPTIONS, "learning_rate": 1e-2})
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmkit", "train", "--backend",
         "torch", "--data", str(data.path), "--out", str(tmp_path / "two"), "--json", *options],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"val_loss"') == 1
    assert done.stderr.count("validation loss") == 3 and done.stderr.count("step 3: saved") == 1
    assert_same_run(one, Run(tmp_path / "two"), tolerance=2e-5)
    assert main_log(one) == main_log(Run(tmp_path / "two"))


def test_what_torchrun_says() -> None:
    four = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "a", "MASTER_PORT": "1"}  # fmt: skip
    assert Torchrun.from_environment(four) == Torchrun(rank=3, world=4, local_rank=1, local_world=2)
    assert Torchrun.from_environment({**four, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert Torchrun.from_environment({"RANK": "1", "WORLD_SIZE": "4"}) is None  # a scheduler's, for something else
    with pytest.raises(ValueError, match="RANK"):
        Torchrun.from_environment({**four, "RANK": "first"})


# --- sharing out


@pytest.mark.parametrize("backend", TRAINERS)
def test_every_row_has_one_process_and_the_parts_are_alike(data: TokenData, tmp_path: Path, backend: str) -> None:
    from llmkit_speedrun.training import SpeedrunTraining
    from llmkit_torch.training import GPT2Training
    from llmkit_torch.update import _deal_out

    trainer, own = TRAINERS[backend]
    planned = plan(trainer, {**OPTIONS, **own, "depth": 4}, data=data.path, out=tmp_path / "run", resume=False)
    job = planned.job(None, threading.Event())  # type: ignore[arg-type]
    loop = (SpeedrunTraining if backend == "speedrun" else GPT2Training)(job)
    total = sum(p.numel() for p in loop.model.parameters())
    for count in (1, 2, 3, 5):
        pieces, size = _deal_out(loop.model, loop.optimisers, count)
        assert size < 1.3 * total / count
        for name, p in loop.model.named_parameters():
            rows = sorted(row for piece in pieces if piece.name == name for row in range(piece.first, piece.end))
            assert rows == list(range(p.shape[0])), name
        for rank in range(count):
            places = sorted((piece.place.start, piece.place.stop) for piece in pieces if piece.rank == rank)
            assert places[0][0] == 0 and all(one[1] == two[0] for one, two in pairwise(places))
            assert places[-1][1] <= size
    muon = [id(p) for group in loop.optimisers[-1].param_groups for p in group["params"]]
    if backend == "speedrun":
        matrices = [piece for piece in _deal_out(loop.model, loop.optimisers, 4)[0] if id(piece.parameter) in muon]
        assert len(matrices) == len(muon) and {piece.rank for piece in matrices} == {0, 1, 2, 3}


# --- ends


def test_a_worker_that_cannot_start_is_named(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(
        ValueError, match="process 1 of the 2 of this run ended with status 3: no such library; nothing"
    ):
        run(data, "torch", tmp_path / "run", nproc=2)


@contextlib.contextmanager
def long_run(data: TokenData, out: Path, backend: str = "torch") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run of two processes that has saved something, and the worker's process id; nothing is left afterwards."""
    options = {**OPTIONS, "steps": 100_000, "val_every": 0, "checkpoint_every": 20, "keep_last": 2}
    args = command("--backend", backend, "--data", data.path, "--out", out, "--nproc", 2, *flags(options))
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 100
        while not Run(out).checkpoints:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == 1
        yield process, workers[0].pid
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive, "a worker outlived the run"
    finally:
        for each in (process, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.communicate()


def test_a_killed_worker_ends_the_run_which_resumes(
    data: TokenData, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    with long_run(data, tmp_path / "run") as (process, worker):
        os.kill(worker, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert "process 1 of the 2 of this run was killed by SIGKILL" in last and "--resume" in last, said
    assert "Traceback" not in said
    done = Run(tmp_path / "run").checkpoints[-1]
    step = int(done.name.removeprefix("step_"))
    run_cli("train", "--resume", "--out", tmp_path / "run", "--nproc", 2, "--steps", step + 2)
    assert Checkpoint.open(tmp_path / "run").step == step + 2


def test_ctrl_c_saves_and_a_killed_first_process_leaves_no_orphan(data: TokenData, tmp_path: Path) -> None:
    with long_run(data, tmp_path / "stopped") as (process, _):
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    found = re.search(r"stopped after step (\d+); continue with", said)
    assert found and Checkpoint.open(tmp_path / "stopped").step == int(found[1]), said
    with long_run(data, tmp_path / "killed") as (process, _):
        process.kill()
        process.wait()
    assert Run(tmp_path / "killed").checkpoints


# --- what cannot work


def test_a_batch_that_does_not_divide_is_refused(data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in each of 3 processes"):
        run(data, "torch", tmp_path / "run", nproc=3)
    with pytest.raises(ValueError, match="--batch-schedule has steps of 2 micro-batches"):
        run(data, "speedrun", tmp_path / "run", batch_schedule=True, total_batch_tokens=384, nproc=3)
    run(data, "torch", tmp_path / "run")
    with pytest.raises(ValueError, match="a step of 4 micro-batches does not divide into 3 processes"):
        run(data, "torch", tmp_path / "run", resume=True, steps=8, nproc=3)


def test_the_batch_that_is_not_given_divides(data: TokenData) -> None:
    for processes in (1, 3, 8):
        given = TorchTrainer.Config(depth=1, width=32, heads=2, device="cpu", nproc=processes)
        config = TorchTrainer.resolve(given, data, None)
        assert config.total_batch_tokens and config.batch_size and config.sequence_length
        assert config.total_batch_tokens % (processes * config.batch_size * config.sequence_length) == 0


def test_what_needs_other_options_says_so(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in TRAINERS:
        with pytest.raises(ValueError, match=r"--fsdp .* add --nproc"):
            run(data, backend, tmp_path / "run", fsdp=True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--nproc 2 starts processes, and torchrun has started 2"):
        run(data, "torch", tmp_path / "run", nproc=2)
    from llmkit_llmc.trainer import LlmcTrainer

    with pytest.raises(ValueError, match="--backend llmc cannot be one of the 2 processes"):
        plan(LlmcTrainer, {}, data=data.path, out=tmp_path / "run", resume=False)
