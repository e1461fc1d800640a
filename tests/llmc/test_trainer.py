"""The plugin keeps the contract of trainers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.report import write_report
from llmkit.run import Run
from llmkit.testing.trainer import TrainerContract
from llmkit.trainer import Evaluation, Step, Trainer, Validation
from llmkit.training import Interrupted
from llmkit_llmc.build import BuildError, find_compiler
from llmkit_llmc.trainer import LlmcTrainer


class TestLlmcTrainer(TrainerContract):
    @pytest.fixture
    def trainer(self) -> type[Trainer]:
        return LlmcTrainer

    def test_hellaswag_during_training(self, run: Any, tmp_path: Path) -> None:
        examples = [{"ctx": "it", "endings": ["a", "b", "c", "d"], "label": i % 4} for i in range(5)]
        path = tmp_path / "hellaswag.jsonl"
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        _, events = run(hellaswag=str(path), threads=1)
        found = [e for e in events if isinstance(e, Evaluation)]
        assert [(e.step, e.task, e.metric, e.n) for e in found] == [(s, "hellaswag", "acc_norm", 5) for s in (3, 6)]
        assert all(e.value in (0.2, 0.4) for e in found)  # the four endings have one label each, the first has two
        records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [r["value"] for r in records if r["kind"] == "eval"] == [e.value for e in found]
        assert f"s:6 eval:{found[-1].value:.4f}" in (tmp_path / "out" / "main.log").read_text().splitlines()
        report = write_report(Run(tmp_path / "out")).read_text()
        assert "## Evaluations during training" in report and "| hellaswag | acc_norm |" in report

    def test_without_clipping_it_resumes_to_the_same_bits(self, run: Any, tmp_path: Path) -> None:
        """One micro-batch in a step and no clipping: weights are updated inside the backward."""
        options = {"grad_clip": 0.0, "total_batch_tokens": 128, "threads": 1}
        run("whole", **options)
        with contextlib.suppress(Interrupted):
            run("cut", stop_after=2, **options)
        run("cut", resume=True)
        one, two = (Checkpoint.open(tmp_path / name) for name in ("whole", "cut"))
        assert two.step == 6 and all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)

    def test_two_processes_give_the_losses_of_one(self, run: Any, tmp_path: Path) -> None:
        try:
            find_compiler(mpi=True)
        except BuildError as missing:
            pytest.skip(str(missing))
        options = {"batch_size": 2, "threads": 1, "sample_every": 3}
        _, one = run("one", **options)
        summary, two = run("two", **options, nproc=2)
        assert [type(e) for e in one] == [type(e) for e in two] and summary.steps == 6
        for kind in (Step, Validation):
            pairs = zip((e for e in one if isinstance(e, kind)), (e for e in two if isinstance(e, kind)), strict=True)
            assert all(abs(a.loss - b.loss) < 1e-5 for a, b in pairs)
        assert (Checkpoint.open(tmp_path / "two").trainer_state or tmp_path).joinpath("state_00001.bin").is_file()
