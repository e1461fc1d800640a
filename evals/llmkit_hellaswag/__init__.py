"""Evaluator `hellaswag`: which of four sentences goes on with a scene (Zellers et al. 2019, arXiv:1905.07830)."""

from __future__ import annotations

import re

from llmkit import hookimpl
from llmkit.evaldata import Row, TaskData, get, get_strings
from llmkit.evaluator import Document, Evaluator
from llmkit.multiple_choice import MultipleChoice, gold_index

BRACKETS = re.compile(r"\[.*?\]")  # [header], [step] and the like, left over from WikiHow's pages


class HellaSwag(MultipleChoice):
    """Which of four sentences goes on with a scene?"""

    name = "hellaswag"
    version = "1.0"
    data = TaskData("hellaswag/{split}.jsonl", "Rowan/hellaswag")
    split = "validation"

    def convert(self, row: Row) -> Document:
        scene = f"{get(row, 'ctx_a', str)} {get(row, 'ctx_b', str).capitalize()}"
        choices = [clean(ending) for ending in get_strings(row, "endings")]
        label = str(row.get("label", ""))  # the hub has strings; in its test split they are empty
        if not label.isdecimal():
            raise ValueError(f"field 'label' is {row.get('label')!r}, not the number of the right ending")
        query = clean(f"{get(row, 'activity_label', str)}: {scene}")
        return {"query": query, "choices": choices, "gold": gold_index(int(label), choices)}


def clean(text: str) -> str:
    """A text without the marks of the pages it came from."""
    text = BRACKETS.sub("", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [HellaSwag]
