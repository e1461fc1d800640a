"""How much sooner the speedrun reaches what tuned GPT-2 with AdamW reaches, and which of its parts are worth what.

    python benchmarks/speedrun.py [--json] [--sweep] [--jobs N] [--out DIR]

Every figure comes from whole runs of `llmkit train` on the same data: learning rates decay to zero in each, and only
the last validation losses are compared, on the same tokens. "Tokens to the baseline" is the shortest of the lengths
tried whose final loss is no higher than the baseline's. Both models have the same number of parameters within 2% (the
baseline is a little wider, since its head is tied). Losses do not depend on the machine's load. Seconds do, so they are
measured side by side, a step of one and a step of the other in turn, and multiplied by the numbers of steps.

`--sweep` trains with each of the values in SWEEPS and takes the best: rates of the baseline, of Muon, then with that of
the embedding, the head and the scalars in turn, steps of momentum warm-up, and with all of them AdamW's rate on the
speedrun's architecture. Without it those in RATES are taken. Finished runs are kept under --out, not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 2048
BATCH = {"sequence_length": 256, "batch_size": 8, "total_batch_tokens": 8192}
SPEEDRUN: dict[str, Any] = {"backend": "speedrun", "depth": 4, "width": 128, "heads": 2}
BASELINE: dict[str, Any] = {"backend": "torch", "depth": 4, "width": 144, "heads": 3, "schedule": "linear",
                            "final_lr_fraction": 0}  # fmt: skip
STEPS = {"baseline": 600, "sweep": 200, "adamw": 400, "ablation": 90}
#: the best of SWEEPS
RATES = {"baseline": 8e-3, "muon": 4e-2, "embedding": 0.6, "head": 1.6e-2, "scalar": 1e-2, "momentum-warmup": 1000,
         "adamw": 8e-3}  # fmt: skip
SWEEPS: dict[str, tuple[float, ...]] = {
    "baseline": (1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2),
    "muon": (2e-2, 4e-2, 8e-2, 1.6e-1),
    "embedding": (0.1, 0.3, 0.6),
    "head": (8e-3, 1.6e-2, 3.2e-2),
    "scalar": (1e-2, 2e-2, 4e-2),
    "momentum-warmup": (100, 300, 1000),
    "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
#: where the sweep begins, for what comes later in it
BEGIN = {"embedding": 0.3, "head": 1.6e-2, "scalar": 2e-2, "momentum-warmup": 100}
#: lengths tried, as parts of what they are compared with
PARTS = {"baseline": (0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.6, 0.8, 1.0),
         "adamw": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)}  # fmt: skip
SWITCHES: dict[str, dict[str, Any]] = {
    "polar-express": {"polar_express": True},
    "normuon": {"normuon": True},
    "weight-decay": {"weight_decay": 0.1},
    "cautious-weight-decay": {"weight_decay": 0.1, "cautious_weight_decay": True},
    "value-embeddings": {"value_embeddings": True},
    "multi-token-prediction": {"multi_token_prediction": True},
    "batch-schedule": {"batch_schedule": True, "batch_size": 4, "steps": 135},  # the same tokens
    "window-schedule": {"window_warmup_steps": 60},
}
SEEDS = (2, 3)  # besides the usual one: how far chance moves a loss
OVERHEAD_TOKENS = 16384


class Runs:
    """Trains, and remembers what came out: DIR/results.json maps a run's options to its final validation loss."""

    def __init__(self, folder: Path, data: Path, jobs: int) -> None:
        self.folder, self.data, self.jobs = folder, data, jobs
        self.file = folder / "results.json"
        self.results: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.lock = threading.Lock()

    def losses(self, runs: Iterable[dict[str, Any]]) -> list[float]:
        """Final validation losses in nats per token, `jobs` runs at a time. Raises CalledProcessError."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self.loss, runs))

    def loss(self, options: dict[str, Any]) -> float:
        """Final validation loss in nats per token. Raises CalledProcessError."""
        options = {**BATCH, "val_every": 0, "val_batches": 80, "sample_every": 0, "checkpoint_every": 0, **options}
        options["val_batches"] = 80 * 8 // options["batch_size"]
        key = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
        if key not in self.results:
            options["threads"] = max(1, (os.cpu_count() or 1) // self.jobs)
            flags = [part for name, value in options.items() for part in _flag(name, value)]
            out = self.folder / "runs" / f"{time.time_ns()}"
            command = [sys.executable, "-m", "llmkit", "train", "--json", "--data", self.data, "--out", out, *flags]
            note(f"training {key}")
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode:
                note(done.stderr)
                done.check_returncode()
            loss = json.loads(done.stdout)["val_loss"]
            with self.lock:
                self.results[key] = loss
                self.file.write_text(json.dumps(self.results, indent=1))
            note(f"{loss:.4f} {key}")
        return self.results[key]


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(folder: Path, source: str | None) -> Path:
    """Novels where the test data are, else the standard library of Python, with a tokenizer of VOCAB tokens."""
    novels = Path(os.environ.get("LLMKIT_TEST_DATA", ROOT.parent / "shared" / "data")) / "text" / "novels"
    chosen = source or (str(novels) if novels.is_dir() else "stdlib")
    data = folder / f"data-{Path(chosen).name}"
    if not data.is_dir():
        command = [sys.executable, "-m", "llmkit", "data", "prepare", chosen, "--out", data, "--vocab-size", VOCAB]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    return data


def shortest(runs: Runs, parts: Sequence[float], steps: int, options: dict[str, Any], goal: float) -> dict[str, Any]:
    """The first of the lengths whose run ends at the goal or below, and all losses on the way."""
    tried: dict[str, float] = {}
    for first in range(0, len(parts), runs.jobs):
        some = parts[first : first + runs.jobs]
        losses = runs.losses({**options, "steps": max(1, round(part * steps))} for part in some)
        tried.update((f"{part:g}", loss) for part, loss in zip(some, losses))
        for part, loss in zip(some, losses):
            if loss <= goal:
                return {"ratio": part, "losses": tried}
    return {"ratio": None, "losses": tried}


def given(kind: str, rates: dict[str, float]) -> dict[str, Any]:
    """A run of the baseline, or with Muon or AdamW on the speedrun's architecture, with these learning rates.

    A fifth of the baseline's steps is warm-up: with a twentieth, 0.004 stalled.
    """
    if kind == "baseline":
        steps = STEPS["baseline"]
        return {**BASELINE, "steps": steps, "warmup_steps": steps // 5, "learning_rate": rates["baseline"]}
    others = {f"{name}_learning_rate": rates[name] for name in ("embedding", "head", "scalar")}
    if kind == "muon":
        own: dict[str, Any] = {"momentum_warmup_steps": int(rates["momentum-warmup"])}
    else:
        own = {"optimizer": "adamw"}
    return {**SPEEDRUN, **others, **own, "steps": STEPS["adamw"], "learning_rate": rates[kind]}


def tokens(runs: Runs, rates: dict[str, float]) -> dict[str, Any]:
    """The two figures about tokens."""
    slower = {**rates, "adamw": rates["adamw"] / 2}  # this run is longer than the sweep's
    gpt2, *both = runs.losses([given("baseline", rates), given("adamw", rates), given("adamw", slower)])
    adamw = min(both)
    muon = given("muon", rates)
    whole = shortest(runs, PARTS["baseline"], STEPS["baseline"], muon, gpt2)
    alone = shortest(runs, PARTS["adamw"], STEPS["adamw"], muon, adamw)
    return {
        "tokens_to_baseline": {**whole, "baseline_loss": gpt2, "goal": 0.45},
        "muon_only_tokens": {**alone, "adamw_loss": adamw, "goal": 0.75},
    }


def sweep(runs: Runs) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Final losses for every value, and the best values; each is tuned with the best of those before it."""
    rates, found = {**RATES, **BEGIN}, {}
    for name, values in SWEEPS.items():
        kind = name if name in ("baseline", "adamw") else "muon"
        plain = [given(kind, {**rates, name: value}) for value in values]
        steps = STEPS["baseline" if kind == "baseline" else "sweep"]
        losses = runs.losses({**options, "steps": steps} for options in plain)
        found[name] = {f"{value:g}": loss for value, loss in zip(values, losses)}
        rates[name] = min(zip(losses, values))[1]
    return found, rates


def ablations(runs: Runs, rates: dict[str, float]) -> dict[str, Any]:
    """Losses without each feature, and with each switch, less that of the `whole` architecture as it is."""
    from llmkit_speedrun.config import FEATURES

    plain = {**given("muon", rates), "steps": STEPS["ablation"]}
    changes = [*({"without": name} for name in FEATURES), *SWITCHES.values(), *({"seed": seed} for seed in SEEDS)]
    whole, *losses = runs.losses({**plain, **change} for change in ({}, *changes))
    differences = dict(zip((*FEATURES, *SWITCHES, *SEEDS), (loss - whole for loss in losses)))
    return {
        "steps": STEPS["ablation"],
        "whole": whole,
        "other_seeds": {str(seed): differences[seed] for seed in SEEDS},
        "without": {name: differences[name] for name in FEATURES},
        "with": {name: differences[name] for name in SWITCHES},
    }


def training(data: Path, options: dict[str, Any]) -> Any:
    """A trainer's loop that can be stepped by hand."""
    from llmkit.plugins import get_plugins
    from llmkit.training import plan

    settings = {name: value for name, value in {**BATCH, "steps": 1000, **options}.items() if name != "backend"}
    planned = plan(get_plugins().trainer(options["backend"]), settings, data=data, out=data / "unused", resume=False)
    job = planned.job(_no_save, threading.Event())
    if options["backend"] == "torch":
        from llmkit_torch.training import GPT2Training

        return GPT2Training(job)
    from llmkit_speedrun.training import SpeedrunTraining

    return SpeedrunTraining(job)


def _no_save(step: int, **_: Any) -> NoReturn:
    raise AssertionError("nothing is saved here")


def side_by_side(loops: list[Any], steps: int) -> list[float]:
    """Median seconds of a step of each, taken in turn, after two that do not count."""
    seconds: list[list[float]] = [[] for _ in loops]
    for step in range(steps + 2):
        for loop, found in zip(loops, seconds):
            began = time.perf_counter()
            loop.train_step()
            if step >= 2:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def speed(data: Path, rates: dict[str, float], steps: int) -> dict[str, Any]:
    """Seconds of a step beside the baseline's; Muon's beside AdamW's, with their memory."""
    ours, theirs = side_by_side(
        [
            training(data, {**SPEEDRUN, "learning_rate": rates["muon"]}),
            training(data, {**BASELINE, "learning_rate": rates["baseline"]}),
        ],
        steps,
    )
    large = {**SPEEDRUN, "total_batch_tokens": OVERHEAD_TOKENS}
    loops = [training(data, {**large, "optimizer": name, "learning_rate": rates[name]}) for name in ("muon", "adamw")]
    muon, adamw = side_by_side(loops, steps)
    alone = []
    for loop in loops:  # the optimiser's part alone, which whole steps are too noisy to show
        loop._accumulate(1)
        found = []
        for _ in range(10):
            began = time.perf_counter()
            loop.optimisers[1].step()
            found.append(time.perf_counter() - began)
        alone.append(statistics.median(found))
    memory = [
        sum(
            value.numel() * value.element_size()
            for state in loop.optimisers[1].state.values()
            for value in state.values()
        )
        for loop in loops
    ]
    return {
        "step_seconds": {"speedrun": ours, "baseline": theirs, "ratio": ours / theirs},
        "muon_overhead": {
            "overhead": (alone[0] - alone[1]) / adamw,
            "whole_steps": muon / adamw - 1,
            "optimiser_ms": {"muon": 1e3 * alone[0], "adamw": 1e3 * alone[1]},
            "tokens_per_step": OVERHEAD_TOKENS,
            "goal": 0.06,
        },
        "muon_memory": {"ratio": memory[0] / memory[1], "bytes": {"muon": memory[0], "adamw": memory[1]}, "goal": 0.6},
    }


def parameters(data: Path) -> dict[str, int]:
    loops = {"speedrun": training(data, SPEEDRUN), "baseline": training(data, BASELINE)}
    return {name: sum(p.numel() for p in loop.model.parameters()) for name, loop in loops.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sweep", action="store_true", help="tune the learning rates first")
    parser.add_argument("--data", metavar="SOURCE", help="text to train on [default: the novels, else stdlib]")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "speedrun", help="where finished runs are kept")
    parser.add_argument("--timed-steps", type=int, default=8, help="steps of each side where seconds are measured")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps: shows that all of it runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the processor's cores")
    args = parser.parse_args()
    if args.quick:
        for name in STEPS:
            STEPS[name] //= 20
        SWITCHES["batch-schedule"]["steps"] //= 20
    args.out.mkdir(parents=True, exist_ok=True)
    data = prepare(args.out, args.data)
    runs, rates = Runs(args.out, data, args.jobs), dict(RATES)
    result: dict[str, Any] = {"parameters": parameters(data), "steps": dict(STEPS), **BATCH}
    if args.sweep:
        result["sweep"], rates = sweep(runs)
    result["learning_rates"] = rates
    result.update(tokens(runs, rates))
    result["ablations"] = ablations(runs, rates)
    result.update(speed(data, rates, args.timed_steps))
    ratio = result["tokens_to_baseline"]["ratio"]
    seconds = None if ratio is None else ratio * result["step_seconds"]["ratio"]
    result["seconds_to_baseline"] = {"ratio": seconds, "goal": 0.5}
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
