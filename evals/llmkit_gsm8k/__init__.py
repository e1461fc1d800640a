"""Evaluators `gsm8k` and `gsm8k_cot`: sums in words, for which a model writes out its way (Cobbe et al. 2021,
arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

from llmkit import hookimpl
from llmkit.evaldata import Row, TaskData, draw, get
from llmkit.evaluator import Answer, Document, Evaluator, Generate, Prompt, Request
from llmkit_gsm8k.examples import EXAMPLES

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
UNIMPORTANT = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]
INVALID = "[invalid]"  # an answer that equals no right one


class Gsm8k(Evaluator):
    """Sums in words; the answer stands behind ####, five examples show it."""

    name = "gsm8k"
    version = "3.0"
    num_fewshot = 5
    higher_is_better: ClassVar[Mapping[str, bool]] = {"exact_match": True, "exact_match_flexible": True}
    lm_eval_names: ClassVar[Mapping[str, str]] = {
        "exact_match": "exact_match,strict-match",
        "exact_match_flexible": "exact_match,flexible-extract",
    }
    data = TaskData("gsm8k/{split}.jsonl", "openai/gsm8k", "main")
    question: ClassVar[str] = "Question: {}\nAnswer:"
    stop: ClassVar[tuple[str, ...]] = ("Question:", "</s>", "<|im_end|>")
    strict: ClassVar[re.Pattern[str]] = re.compile(r"#### (\-?[0-9\.\,]+)")

    def documents(self) -> Sequence[Document]:
        return self.data.load("test", self.context.data_dir, _convert, self.files)

    @cached_property
    def pool(self) -> list[Document]:
        """What examples are drawn from."""
        return self.data.load("train", self.context.data_dir, _convert, self.files)

    def examples(self, document: Document) -> Iterable[Document]:
        """Drawn from the training split, by the document alone."""
        return draw(self.pool, self.shots, self.context.seed, document["question"], [document]) if self.shots else []

    def requests(self, document: Document) -> list[Request]:
        shots = [(self.question.format(shot["question"]), shot["answer"]) for shot in self.examples(document)]
        prompt = Prompt(self.question.format(document["question"]), shots)
        return [Generate(prompt, self.stop, max_tokens=256)]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        """exact_match: the number in the form that the examples show; exact_match_flexible: the last number."""
        (text,) = answers
        assert isinstance(text, str)
        right = _bare(self.target(document))
        strict = self.strict.search(text)
        numbers = NUMBER.findall(text)
        return {
            "exact_match": float(_bare(strict.group(1) if strict else INVALID) == right),
            "exact_match_flexible": float(_bare("".join(numbers[-1]) if numbers else INVALID) == right),
        }

    def target(self, document: Document) -> str:
        return str(document["answer"])


class Gsm8kChainOfThought(Gsm8k):
    """Sums in words; the eight examples of chain-of-thought prompting show how to think aloud."""

    name = "gsm8k_cot"
    num_fewshot = 8
    question = "Q: {}\nA:"
    stop = ("Q:", "</s>", "<|im_end|>")
    strict = re.compile(r"The answer is (\-?[0-9\.\,]+).")

    def examples(self, document: Document) -> Iterable[Document]:
        if self.shots > len(EXAMPLES):
            raise ValueError(f"{self.shots} examples are wanted, and there are {len(EXAMPLES)}")
        return EXAMPLES[: self.shots]

    def target(self, document: Document) -> str:
        return super().target(document).split("####")[-1].strip()


def _convert(row: Row) -> Document:
    answer = get(row, "answer", str)
    if "####" not in answer:
        raise ValueError("field 'answer' has no #### in front of its result")
    return {"question": get(row, "question", str), "answer": answer}


def _bare(answer: str) -> str:
    """An answer without commas, dollar signs, its way, and a full stop."""
    answer = answer.strip()
    for pattern in UNIMPORTANT:
        answer = pattern.sub("", answer)
    return answer.lower()


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [Gsm8k, Gsm8kChainOfThought]
