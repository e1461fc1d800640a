"""Evaluators `arc_easy` and `arc_challenge`: questions of school exams (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from llmkit import hookimpl
from llmkit.evaldata import Row, TaskData, get, get_strings
from llmkit.evaluator import Document, Evaluator
from llmkit.multiple_choice import MultipleChoice


class ArcEasy(MultipleChoice):
    """Science questions of school exams, those that simple methods answer."""

    name = "arc_easy"
    version = "1.0"
    data = TaskData("arc/easy/{split}.jsonl", "allenai/ai2_arc", "ARC-Easy")

    def convert(self, row: Row) -> Document:
        choices = get(row, "choices", dict)
        texts, labels = get_strings(choices, "text"), get_strings(choices, "label")
        key = get(row, "answerKey", str)
        if len(texts) != len(labels) or key not in labels:
            raise ValueError(f"field 'answerKey' is {key!r}, and the {len(texts)} choices have the labels {labels}")
        return {
            "query": f"Question: {get(row, 'question', str)}\nAnswer:",
            "choices": texts,
            "gold": labels.index(key),
        }


class ArcChallenge(ArcEasy):
    """Science questions of school exams, those that simple methods fail."""

    name = "arc_challenge"
    data = TaskData("arc/challenge/{split}.jsonl", "allenai/ai2_arc", "ARC-Challenge")


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [ArcEasy, ArcChallenge]
