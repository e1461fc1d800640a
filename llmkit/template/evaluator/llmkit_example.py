"""Evaluator `example`: does the model know which sum is right?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmkit import hookimpl
from llmkit.evaluator import Answer, Document, Evaluator, Likelihood, LogLikelihood, Request


class Example(Evaluator):
    """Multiple choice: the right sum out of three."""

    name = "example"
    version = "1"
    higher_is_better = {"acc": True}

    def documents(self) -> Iterable[Document]:
        for a in range(2, 8):
            for b in range(2, 8):
                yield {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1}", f" {a + b - 1}"], "answer": 0}

    def requests(self, document: Document) -> list[Request]:
        return [LogLikelihood(document["question"], choice) for choice in document["choices"]]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        logprobs = [answer.logprob for answer in answers if isinstance(answer, Likelihood)]
        return {"acc": float(logprobs.index(max(logprobs)) == document["answer"])}


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [Example]
