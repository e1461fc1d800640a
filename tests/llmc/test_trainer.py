"""The plugin keeps the contract of trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.testing.trainer import TrainerContract
from llmkit.trainer import Step, Trainer, Validation
from llmkit_llmc.build import BuildError, find_compiler
from llmkit_llmc.trainer import LlmcTrainer


class TestLlmcTrainer(TrainerContract):
    @pytest.fixture
    def trainer(self) -> type[Trainer]:
        return LlmcTrainer

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
