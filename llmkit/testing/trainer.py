"""Contract of trainers."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.data.tokens import TokenData
from llmkit.options import field_types
from llmkit.plugins import NAME
from llmkit.testing.tiny import tiny_data
from llmkit.trainer import Finished, Saved, Started, Step, TrainConfig, Trainer, Validation
from llmkit.training import Interrupted, Progress, Summary, plan, train

Run = Callable[..., tuple[Summary, list[Any]]]


class TrainerContract:
    """Give the fixture `trainer`. `options` may be changed for a backend that cannot train so small a model."""

    options: ClassVar[dict[str, Any]] = {
        "depth": 1,
        "width": 32,
        "heads": 2,
        "sequence_length": 32,
        "batch_size": 4,
        "total_batch_tokens": 256,
        "steps": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "dtype": "fp32",
        "val_every": 3,
        "val_batches": 2,
        "sample_every": 0,
        "checkpoint_every": 3,
        "keep_last": 0,
    }

    @pytest.fixture
    def trainer(self) -> type[Trainer]:
        raise NotImplementedError("a subclass of TrainerContract gives the fixture `trainer`")

    @pytest.fixture
    def data(self, tmp_path: Path) -> TokenData:
        return tiny_data(tmp_path / "data")

    @pytest.fixture
    def run(self, trainer: type[Trainer], data: TokenData, tmp_path: Path) -> Run:
        """Train into tmp_path/out; (summary, events). A keyword overrides an option."""

        def run(out: str = "out", *, resume: bool = False, stop_after: int | None = None, **changes: Any) -> Any:
            events: list[Any] = []

            def show(progress: Progress) -> None:
                events.append(progress.event)

            options = {} if resume else {**self.options, **changes}
            planned = plan(trainer, options, data=data.path, out=tmp_path / out, resume=resume)
            if stop_after is not None:
                planned = _stopping(planned, stop_after)
            return train(planned, show), events

        return run

    def test_has_a_name_and_a_summary(self, trainer: type[Trainer]) -> None:
        assert NAME.fullmatch(trainer.name)
        assert trainer.summary()

    def test_options_become_flags(self, trainer: type[Trainer]) -> None:
        assert issubclass(trainer.Config, TrainConfig)
        assert set(field_types(TrainConfig)) <= set(field_types(trainer.Config))
        trainer.Config()  # every option has a default

    def test_events_are_whole_and_in_order(self, run: Run) -> None:
        summary, events = run()
        assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
        assert [e.step for e in events if isinstance(e, Step)] == list(range(6))
        assert [e.step for e in events if isinstance(e, Validation)] == [0, 3, 6]
        assert [e.step for e in events if isinstance(e, Saved)] == [3, 6]
        assert all(e.tokens == 256 and e.seconds > 0 for e in events if isinstance(e, Step))
        assert summary.steps == 6 and summary.tokens == 6 * 256

    def test_the_loss_falls(self, run: Run) -> None:
        _, events = run(steps=30, val_every=30)
        first, last = (e.loss for e in events if isinstance(e, Validation))
        assert last < first - 0.3

    def test_the_checkpoint_opens_and_says_where_it_came_from(
        self, run: Run, trainer: type[Trainer], data: TokenData, tmp_path: Path
    ) -> None:
        run()
        checkpoint = Checkpoint.open(tmp_path / "out")
        assert checkpoint.step == 6
        assert checkpoint.provenance["backend"] == trainer.name
        assert checkpoint.provenance["data"]["fingerprint"] == data.fingerprint
        assert checkpoint.tokenizer.fingerprint == data.tokenizer_fingerprint
        assert checkpoint.config["vocab_size"] >= data.vocab_size
        assert all(np.isfinite(array).all() for array in checkpoint.weights.values())

    def test_it_prints_nothing(self, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        run()
        assert capfd.readouterr() == ("", "")

    def test_it_repeats(self, run: Run) -> None:
        losses = [[e.loss for e in run(out)[1] if isinstance(e, Step)] for out in ("one", "two")]
        assert losses[0] == losses[1]

    def test_resuming_gives_the_same_bits(self, run: Run, tmp_path: Path) -> None:
        run("whole")
        with pytest.raises(Interrupted, match="after step 4"):
            run("cut", stop_after=4)
        summary, events = run("cut", resume=True)
        assert [e.step for e in events if isinstance(e, Step)] == [4, 5]
        assert summary.tokens == 6 * 256
        whole, cut = (Checkpoint.open(tmp_path / name).weights for name in ("whole", "cut"))
        assert set(whole) == set(cut)
        for name in whole:
            assert np.array_equal(whole[name], cut[name]), f"{name} differs after resuming"
        logs = [re.sub(r" tel:.*", "", (tmp_path / name / "main.log").read_text()) for name in ("whole", "cut")]
        assert logs[0] == logs[1]

    def test_it_begins_with_the_weights_of_a_checkpoint(self, run: Run, tmp_path: Path) -> None:
        _, before = run("first")
        _, after = run("second", from_checkpoint=str(tmp_path / "first"))
        last = [e.loss for e in before if isinstance(e, Validation)][-1]
        first = next(e.loss for e in after if isinstance(e, Validation))
        assert first == pytest.approx(last, abs=1e-4)

    def test_a_batch_that_does_not_divide_is_refused(self, run: Run) -> None:
        with pytest.raises(ValueError, match="--total-batch-tokens 250"):
            run(total_batch_tokens=250)


def _stopping(planned: Any, after: int) -> Any:
    """The plan, with Ctrl-C pressed during step number `after`, counted from 1."""
    import dataclasses

    class Stopping(planned.trainer):  # type: ignore[misc, name-defined]
        def train(self, job: Any) -> Any:
            stop: threading.Event = job.stop
            steps = itertools.count(1)
            for event in super().train(job):
                if isinstance(event, Step) and next(steps) == after:
                    stop.set()
                yield event

    return dataclasses.replace(planned, trainer=Stopping)
