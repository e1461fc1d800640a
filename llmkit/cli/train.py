"""`llmkit train`: its options, and what it shows while training."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmkit.cli.flags import ComponentCommand, given, value_of
from llmkit.cli.ui import emit, json_option, note, progress
from llmkit.torchrun import Torchrun
from llmkit.trainer import Evaluation, Finished, Note, Sample, Saved, Started, Step, TrainConfig, Validation

if TYPE_CHECKING:
    from llmkit.training import Plan, Progress, Summary


def _config_of(backend: str | None) -> type[TrainConfig]:
    if backend is None:
        return TrainConfig
    from llmkit.plugins import get_plugins

    return get_plugins().trainer(backend).Config


class TrainCommand(ComponentCommand):
    """Says in its help which backends there are; a run that is resumed knows its own."""

    def selected(self, args: list[str]) -> str | None:
        named, out = super().selected(args), value_of("--out", args)
        if named or "--resume" not in args or out is None:
            return named
        from llmkit.run import Run

        run = Run(Path(out))
        return str(run.config()["backend"]) if run.exists else None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from llmkit.plugins import get_plugins

        if trainers := get_plugins().all("trainer"):
            with formatter.section("Backends (train --backend NAME --help lists the options of each)"):
                formatter.write_dl([(trainer.name, trainer.summary()) for trainer in trainers])


@click.command("train", cls=TrainCommand, selector="--backend", options_of=_config_of)
@click.option("--backend", metavar="NAME", help="Training backend. [default: torch on a GPU, else llmc]")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Folder made by llmkit data prepare.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="RUN", help="Run directory. [default: runs/TIME-BACKEND]"
)
@click.option("--resume", is_flag=True, help="Continue the run in --out from its newest checkpoint, to the same bits.")
@json_option
def command(
    backend: str | None, data: Path | None, out: Path | None, resume: bool, as_json: bool, **values: Any
) -> None:
    """Train a model on prepared data.

    `--depth` alone is a good run: everything else follows from it and from the data.
    """
    from llmkit.plugins import get_plugins
    from llmkit.training import Interrupted, plan

    options = given(_config_of(click.get_current_context().meta["component"]), values)
    if resume and out is None:
        raise click.UsageError("--resume needs --out: the run to continue")
    if data is None and not resume:
        raise click.UsageError("--data is missing: name a folder made by llmkit data prepare")
    name = backend or (None if resume else default_backend())
    out = out or Path("runs", time.strftime("%Y%m%d-%H%M%S") + f"-{name}")
    planned = plan(get_plugins().trainer(name) if name else None, options, data=data, out=out, resume=resume)
    if planned.follower:
        _follow(planned)
        return
    try:
        summary = train_with_progress(planned, samples=not as_json)
    except Interrupted as stopped:
        note(str(stopped))
        raise
    if as_json:
        emit(dataclasses.asdict(summary))
    else:
        print(summary_line(summary))
        print(f"next: llmkit generate {out} --prompt 'Once upon a time'    llmkit eval {out} --tasks bpb")


def _follow(planned: Plan) -> None:
    """Train silently: another of torchrun's processes says all there is to say."""
    from llmkit.training import Interrupted, train

    try:
        train(planned, lambda progress: None)
    except Interrupted:
        sys.exit(130)


def default_backend() -> str:
    """`torch` where it has a GPU or under torchrun, else `llmc`, else `torch`.

    Raises ValueError, saying what to install, if none works.
    """
    from llmkit.plugins import get_plugins

    reasons = []
    for name in ("torch", "llmc") if Torchrun.from_environment() or _torch_has_gpu() else ("llmc", "torch"):
        if name not in get_plugins().names("trainer"):
            continue
        reason = get_plugins().trainer(name).unavailable()
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    raise ValueError("no training backend can run here: " + "; ".join(reasons))


def _torch_has_gpu() -> bool:
    """Imports PyTorch, which takes a second, only where a driver says that there may be a GPU."""
    import shutil

    from llmkit.component import missing_modules

    if missing_modules(["torch"]) or not (shutil.which("nvidia-smi") or sys.platform == "darwin"):
        return False
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def train_with_progress(planned: Plan, *, samples: bool = True) -> Summary:
    """Train with a progress bar and notes on stderr."""
    from llmkit.training import train

    c = planned.config
    first = (planned.start.step or 0) if planned.resume and planned.start else 0
    note(
        f"{planned.trainer.name}: depth {c.depth}, width {c.width}, {c.heads} heads, "
        f"vocabulary {planned.data.vocab_size}, sequence length {c.sequence_length}\n"
        f"{c.steps} steps of {c.total_batch_tokens:,} tokens in micro-batches of {c.batch_size} x {c.sequence_length}, "
        f"learning rate {c.learning_rate:g} ({c.schedule}, {c.warmup_steps} steps of warm-up)"
    )
    if planned.resume:
        note(f"resuming after step {first}")
    with progress("training", c.steps, initial=first) as update:
        return train(planned, _Display(update, samples).show)


class _Display:
    """Turns events into the bar's status and notes."""

    def __init__(self, update: Any, samples: bool) -> None:
        self.update, self.samples = update, samples
        self.validation = ""

    def show(self, progress: Progress) -> None:
        event, values = progress.event, progress.values
        if isinstance(event, Started):
            peak = f", {event.peak_flops / 1e9:,.0f} GFLOP/s at best" if event.peak_flops else ""
            note(f"{event.parameters:,} parameters on {event.device}{peak}")
        elif isinstance(event, Step):
            mfu = f" mfu {100 * values['mfu']:.0f}%" if "mfu" in values else ""
            status = f"loss {event.loss:.3f}{self.validation} {values['tokens_per_second']:,.0f} tok/s{mfu}"
            self.update(event.step + 1, status=status)
        elif isinstance(event, Validation):
            self.validation = f" val {event.loss:.3f}"
            note(f"step {event.step}: validation loss {event.loss:.4f}, {values['bpb']:.4f} bits per byte")
        elif isinstance(event, Evaluation):
            note(f"step {event.step}: {event.task} {event.metric} {event.value:.4f} over {event.n} documents")
        elif isinstance(event, Sample) and self.samples:
            note(f"step {event.step}: {event.text!r}")
        elif isinstance(event, Saved):
            note(f"step {event.step}: saved {event.path}")
        elif isinstance(event, Note):
            note(event.text)
        elif isinstance(event, Finished) and not event.interrupted:
            self.update(event.step)


def summary_line(summary: Summary) -> str:
    """One line for people."""
    parts = [f"{summary.run}: {summary.steps} steps, {summary.tokens:,} tokens"]
    if summary.train_loss is not None:
        parts.append(f"train loss {summary.train_loss:.4f}")
    if summary.val_loss is not None and summary.val_bpb is not None:
        parts.append(f"validation loss {summary.val_loss:.4f} = {summary.val_bpb:.4f} bits per byte")
    if summary.tokens_per_second is not None:
        parts.append(f"{summary.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)
