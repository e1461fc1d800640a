"""MultipleChoice: base of tasks that take the answer to which the model gives the highest probability."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

from llmkit.evaldata import Row, TaskData, draw
from llmkit.evaluator import Answer, Document, Evaluator, Likelihood, LogLikelihood, Prompt, Request


class MultipleChoice(Evaluator):
    """A context and some continuations, scored as the lm-evaluation-harness does.

    A document is {"query": str, "choices": [str, ...], "gold": number of the right choice, ...}; the prompt is the
    examples, each with its answer and an empty line, and the query; a continuation is a space and a choice.
    acc: the right choice has the highest summed log-likelihood; acc_norm: the highest per character of the choice.
    Of equals the first counts.

    Class attributes:
        data, split: where the documents are.
        fewshot_split: where the examples are drawn from.
        normalised: whether there is acc_norm, which says nothing where all choices have the same length.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"acc": True, "acc_norm": True}
    data: ClassVar[TaskData]
    split: ClassVar[str] = "test"
    fewshot_split: ClassVar[str] = "train"
    normalised: ClassVar[bool] = True

    @abstractmethod
    def convert(self, row: Row) -> Document:
        """A row of the data as a document. Raises ValueError saying what is wrong with it."""

    def documents(self) -> Sequence[Document]:
        return self._documents

    @cached_property
    def _documents(self) -> list[Document]:
        return self.data.load(self.split, self.context.data_dir, self.convert, self.files)

    @cached_property
    def pool(self) -> list[Document]:
        """What examples are drawn from."""
        return self.data.load(self.fewshot_split, self.context.data_dir, self.convert, self.files)

    def examples(self, document: Document) -> Iterable[Document]:
        """The examples for a document: drawn by the document alone."""
        return draw(self.pool, self.shots, self.context.seed, document["query"], [document]) if self.shots else []

    def description(self, document: Document) -> str:
        """What stands in front of everything."""
        return ""

    def requests(self, document: Document) -> list[Request]:
        shots = [(shot["query"], shot["choices"][shot["gold"]]) for shot in self.examples(document)]
        context = Prompt(document["query"], shots, self.description(document))
        return [LogLikelihood(context, f" {choice}") for choice in document["choices"]]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        sums = [answer.logprob for answer in answers if isinstance(answer, Likelihood)]
        gold = document["gold"]
        scores = {"acc": float(_best(sums) == gold)}
        if self.normalised:
            lengths = [max(len(choice), 1) for choice in document["choices"]]
            scores["acc_norm"] = float(_best([value / n for value, n in zip(sums, lengths)]) == gold)
        return scores


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def gold_index(index: int, choices: Sequence[str]) -> int:
    """`index`, when there is such a choice. Raises ValueError otherwise."""
    if not 0 <= index < len(choices):
        raise ValueError(f"the right answer is number {index}, and there are {len(choices)} choices")
    return index
