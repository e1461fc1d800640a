"""Training: drives a trainer from the options of a user to a finished run, whatever the backend.

It resolves the options, opens the run, records every event, watches for NaN and Ctrl-C, and sums up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llmkit.checkpoint import Checkpoint, remember_run
from llmkit.component import require
from llmkit.data.tokens import TokenData, ValidationBatches
from llmkit.run import Run
from llmkit.torchrun import Torchrun
from llmkit.trainer import Evaluation, Event, Finished, Save, Saved, Started, Step, Trainer, TrainJob, Validation
from llmkit.trainer import Sample as SampleEvent
from llmkit.weights import Array

#: options that may differ when a run is resumed: they change neither the model nor the order of the data
RESUMABLE = {"steps", "val_every", "sample_every", "sample_tokens", "checkpoint_every", "keep_last", "keep_every"}

ECHO_SECONDS = 2.0  # within which a repeated signal under torchrun is the same one


class Diverged(ValueError):
    """The loss or the gradient is no longer a number."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; its state is saved."""


@dataclass
class Summary:
    """What a run came to, under the names that `train --json` prints. Unknown figures are None."""

    run: str
    steps: int = 0
    tokens: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Progress:
    """An event with what the core makes of it; `values` is what metrics.jsonl records beside the step."""

    event: Event
    steps: int
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A training run that is ready to start: everything has been checked."""

    trainer: type[Trainer]
    config: Any
    data: TokenData
    start: Checkpoint | None
    resume: bool
    run: Run

    @property
    def follower(self) -> bool:
        """Is this one of torchrun's processes, but not the one that shows and records the run?"""
        started = Torchrun.from_environment()
        return started is not None and started.rank > 0

    @functools.cached_property
    def validation(self) -> ValidationBatches:
        """The batches of every validation."""
        c = self.config
        batches = None if c.val_batches < 0 else max(1, c.val_batches)
        return ValidationBatches(self.data, c.batch_size, c.sequence_length, batches=batches)

    def job(self, save: Save, stop: threading.Event) -> TrainJob:
        """What the trainer is given."""
        return TrainJob(
            config=self.config,
            data=self.data,
            start=self.start,
            resume=self.resume,
            save=save,
            stop=stop,
            out=self.run.path,
            validation=self.validation,
        )


def plan(
    trainer: type[Trainer] | None, given: Mapping[str, Any], *, data: Path | None, out: Path, resume: bool
) -> Plan:
    """Check and complete what a user asked for. `given` holds only the options that were set.

    To resume, trainer and data may be None: the run knows them. Raises ValueError where it cannot work.
    """
    run = Run(out)
    if resume and run.exists and run.checkpoints:
        return _plan_resume(run, trainer, given, data)
    if trainer is None:
        raise ValueError(f"there is nothing to resume in {out}: it has no complete checkpoint")
    if run.exists and run.checkpoints and not resume:
        raise ValueError(f"{out} holds a training run already: continue it with --resume, or choose another --out")
    if data is None:
        raise ValueError("--data is missing: name a folder made by llmkit data prepare")
    _check_can_run(trainer)
    config = trainer.Config(**given)
    opened = TokenData(data)
    start = Checkpoint.open(config.from_checkpoint) if config.from_checkpoint else None
    config = trainer.resolve(config, opened, start)
    return Plan(trainer, config, opened, start, False, run)


def _check_can_run(trainer: type[Trainer]) -> None:
    require(trainer.requires, f"trainer {trainer.name!r}")
    started = Torchrun.from_environment()
    if started and not trainer.torchrun:
        raise ValueError(
            f"--backend {trainer.name} cannot be one of the {started.world} processes that torchrun starts: start it "
            "without torchrun"
        )


def _plan_resume(run: Run, trainer: type[Trainer] | None, given: Mapping[str, Any], data: Path | None) -> Plan:
    from llmkit.plugins import get_plugins

    saved = run.config()
    if trainer is not None and trainer.name != saved["backend"]:
        raise ValueError(
            f"{run.path} was trained by --backend {saved['backend']} and cannot resume with {trainer.name}"
        )
    trainer = trainer or get_plugins().trainer(saved["backend"])
    _check_can_run(trainer)
    start = Checkpoint.open(run.path)
    if start.trainer_state is None:
        raise ValueError(f"{start.path} has no trainer_state to resume from; begin a new run with --from {start.path}")
    fields = {field.name for field in dataclasses.fields(trainer.Config)}
    config = trainer.Config(**{name: value for name, value in saved["config"].items() if name in fields})
    for name, value in given.items():
        if name not in RESUMABLE | trainer.resumable and getattr(config, name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} was {getattr(config, name)} when the run began and cannot become {value}: leave it out"
            )
    config = dataclasses.replace(config, **given)
    opened = TokenData(data or saved["data"]["path"])
    if opened.fingerprint != saved["data"]["fingerprint"]:
        raise ValueError(f"the data in {opened.path} are not those that {run.path} was trained on")
    return Plan(trainer, config, opened, start, True, run)


def train(plan: Plan, show: Callable[[Progress], None]) -> Summary:
    """Run a plan to its end, calling `show` for every event.

    Raises Diverged when the loss turns NaN, Interrupted after Ctrl-C or SIGTERM (state saved), and what the trainer
    raises. As a follower it shows and records nothing, and the summary stays empty.
    """
    _ = plan.validation  # too little data shows before anything is written
    if plan.follower:
        return _follow(plan)
    plan.run.acquire()
    with contextlib.closing(plan.run), _stop_on_signal() as stop:
        recorder = _Recorder(plan, show)
        plan.run.begin(recorder.description, step=recorder.first_step)
        finished = None
        with _closing(plan.trainer().train(plan.job(recorder.save, stop))) as events:
            for event in events:
                recorder.handle(event)
                if isinstance(event, Finished):
                    finished = event
        if finished is None:
            raise RuntimeError(f"trainer {plan.trainer.name!r} ended without a Finished event")
        if finished.interrupted:
            advice = "nothing had to be saved"
            if plan.run.checkpoints:
                advice = f"continue with: llmkit train --resume --out {plan.run.path}"
            raise Interrupted(f"stopped after step {finished.step}; {advice}")
        return recorder.summary


def _follow(plan: Plan) -> Summary:
    """Take part in a run that another process records. Raises Interrupted as that one does."""

    def refuse(step: int, **kwargs: Any) -> Saved:
        raise RuntimeError(f"trainer {plan.trainer.name!r} saves in another process than the first")

    with _stop_on_signal(says=False) as stop, _closing(plan.trainer().train(plan.job(refuse, stop))) as events:
        for event in events:
            if isinstance(event, Finished) and event.interrupted:
                raise Interrupted(f"stopped after step {event.step}")
    return Summary(run=str(plan.run.path))


@contextlib.contextmanager
def _closing(events: Iterator[Event]) -> Iterator[Iterator[Event]]:
    """End a generator at once when its events are no longer wanted, so that it lets go of what it has started."""
    try:
        yield events
    finally:
        if isinstance(events, Generator):
            events.close()


class _Recorder:
    """Turns events into metrics.jsonl, main.log, what is shown, and the summary."""

    def __init__(self, plan: Plan, show: Callable[[Progress], None]) -> None:
        self.plan, self.run, self.show = plan, plan.run, show
        self.steps: int = plan.config.steps
        self.first_step = (plan.start.step or 0) if plan.resume and plan.start else 0
        self.tokens_before = int(plan.start.provenance.get("tokens", 0)) if plan.resume and plan.start else 0
        self.summary = Summary(run=str(plan.run.path), steps=self.first_step, tokens=self.tokens_before)
        if plan.resume and plan.start:
            for name in ("train_loss", "val_loss", "val_bpb"):
                setattr(self.summary, name, plan.start.provenance.get(name))
        self.started: Started | None = None
        self.peak_flops: float | None = None
        self.seconds = 0.0
        self.data = {"path": str(plan.data.path.resolve()), "fingerprint": plan.data.fingerprint}
        from llmkit import __version__

        self.description = {
            "llmkit_version": __version__,
            "backend": plan.trainer.name,
            "config": dataclasses.asdict(plan.config),
            "data": self.data,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def handle(self, event: Event) -> None:
        values: dict[str, Any] = {}
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Step):
            values = self._step(event)
        elif isinstance(event, Validation):
            values = self._validation(event)
        elif isinstance(event, Evaluation):
            values = {"task": event.task, "metric": event.metric, "value": event.value, "n": event.n}
            self.run.record("eval", event.step, **values)
            self.run.log(f"s:{event.step} eval:{event.value:.4f}")
        elif isinstance(event, SampleEvent):
            self.run.record("sample", event.step, text=event.text)
        elif isinstance(event, Saved):
            remember_run(self.run.path)
        self.show(Progress(event, self.steps, values))

    def _step(self, event: Step) -> dict[str, Any]:
        summary = self.summary
        if not (math.isfinite(event.loss) and math.isfinite(event.grad_norm)):
            what = "loss" if not math.isfinite(event.loss) else "gradient norm"
            before = self.run.checkpoints
            advice = f"the last good checkpoint is {before[-1]}" if before else "no checkpoint had been saved"
            raise Diverged(
                f"the {what} is {event.loss if what == 'loss' else event.grad_norm} at step {event.step}: {advice}; "
                "try a lower --learning-rate or more --warmup-steps"
            )
        summary.steps = event.step + 1
        summary.tokens += event.tokens
        summary.train_loss = event.loss
        self.seconds += event.seconds
        trained = summary.tokens - self.tokens_before
        summary.tokens_per_second = trained / self.seconds if self.seconds > 0 else None
        rate = event.tokens / event.seconds if event.seconds > 0 else 0.0
        values: dict[str, Any] = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens": summary.tokens,
            "seconds": event.seconds,
            "tokens_per_second": rate,
        }
        if self.started and self.started.peak_flops:
            flops = rate * self.started.flops_per_token
            self.peak_flops = max(self.peak_flops or self.started.peak_flops, flops)  # it was measured too low, then
            values["mfu"] = flops / self.peak_flops
        if event.skipped:
            values["skipped"] = True
        self.run.record("step", event.step, **values)
        rate_and_norm = f"lr:{event.learning_rate:.6f} norm:{event.grad_norm:.2f}"
        self.run.log(f"s:{event.step} trl:{event.loss:.4f} {rate_and_norm}")
        return values

    def _validation(self, event: Validation) -> dict[str, Any]:
        if not math.isfinite(event.loss):
            raise Diverged(f"the validation loss is {event.loss} after {event.step} steps")
        bpb = self.plan.validation.bits_per_byte(event.loss)
        self.summary.val_loss, self.summary.val_bpb = event.loss, bpb
        self.run.record("val", event.step, loss=event.loss, bpb=bpb)
        self.run.log(f"s:{event.step} tel:{event.loss:.4f}")
        return {"loss": event.loss, "bpb": bpb}

    def save(
        self,
        step: int,
        *,
        config: Mapping[str, Any],
        weights: Mapping[str, Array],
        write_state: Callable[[Path], None],
        val_loss: float | None,
    ) -> Saved:
        """The `save` of TrainJob."""
        provenance = {
            **{name: self.description[name] for name in ("backend", "config", "data")},
            "step": step,
            "tokens": self.summary.tokens,
            "train_loss": self.summary.train_loss,
            "val_loss": val_loss,
            "val_bpb": None if val_loss is None else self.plan.validation.bits_per_byte(val_loss),
            "tokenizer": self.plan.data.meta["tokenizer"],
        }
        return self.run.save(
            step,
            config=config,
            weights=weights,
            tokenizer=self.plan.data.tokenizer,
            provenance=provenance,
            write_state=write_state,
            keep_last=self.plan.config.keep_last,
            keep_every=self.plan.config.keep_every,
        )


@contextlib.contextmanager
def _stop_on_signal(*, says: bool = True) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one interrupts at once.

    torchrun passes on what the terminal has told its processes already: a second signal on the heels of the first is
    the same one there.
    """
    stop = threading.Event()
    first = 0.0
    echo_seconds = ECHO_SECONDS if Torchrun.from_environment() else 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.is_set():
            if time.monotonic() - first < echo_seconds:
                return
            raise KeyboardInterrupt
        first = time.monotonic()
        stop.set()
        if says:  # os.write, since a signal may come in the middle of a print
            os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
