"""Contract of evaluators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmkit.evaluator import Answer, EvalContext, Evaluator, Generate, Likelihood, Request, RollingLogLikelihood
from llmkit.plugins import NAME
from llmkit.testing.tiny import tiny_checkpoint

LIMIT = 20


class EvaluatorContract:
    """Give the fixture `evaluator`. Override `data_dir` and `options` where the task needs local data."""

    @pytest.fixture
    def evaluator(self) -> type[Evaluator]:
        raise NotImplementedError("a subclass of EvaluatorContract gives the fixture `evaluator`")

    @pytest.fixture
    def data_dir(self) -> Path | None:
        return None

    @pytest.fixture
    def options(self) -> Mapping[str, str]:
        return {}

    @pytest.fixture
    def task(
        self, evaluator: type[Evaluator], data_dir: Path | None, options: Mapping[str, str], tmp_path: Path
    ) -> Evaluator:
        checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
        return evaluator(EvalContext(checkpoint, checkpoint.tokenizer, data_dir=data_dir, options=options))

    @pytest.fixture
    def documents(self, task: Evaluator) -> list[Any]:
        return list(itertools.islice(task.documents(), LIMIT))

    def test_has_a_name_a_summary_and_a_version(self, evaluator: type[Evaluator]) -> None:
        assert NAME.fullmatch(evaluator.name)
        assert evaluator.summary()
        assert isinstance(evaluator.version, str) and evaluator.version

    def test_documents_come_in_the_same_order(self, task: Evaluator, documents: list[Any]) -> None:
        assert documents, "the task has no documents"
        assert list(itertools.islice(task.documents(), LIMIT)) == documents

    def test_requests_depend_on_the_document_alone(self, task: Evaluator, documents: list[Any]) -> None:
        forward = [task.requests(document) for document in documents]
        backward = [task.requests(document) for document in reversed(documents)][::-1]
        assert forward == backward
        assert all(forward)

    def test_scores_are_numbers_with_a_direction(self, task: Evaluator, documents: list[Any]) -> None:
        scores = [task.score(d, [_answer(r) for r in task.requests(d)]) for d in documents]
        assert all(set(score) == set(scores[0]) for score in scores)
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for s in scores for value in s.values())
        metrics = task.aggregate(scores)
        assert metrics, "no metrics were aggregated"
        assert all(math.isfinite(metric.value) for metric in metrics.values())
        missing = set(metrics) - set(task.higher_is_better)
        assert not missing, f"higher_is_better does not say the direction of {missing}"

    def test_no_documents_aggregate_to_nothing(self, task: Evaluator) -> None:
        assert task.aggregate([]) == {}


def _answer(request: Request) -> Answer:
    """A plausible answer, a function of the request alone."""
    if isinstance(request, Generate):
        return f" The answer is {len(request.prompt)}."
    text = request.text if isinstance(request, RollingLogLikelihood) else request.continuation
    return Likelihood(-1.5 * max(1, len(text)), False, max(1, len(text)))
