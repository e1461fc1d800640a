"""Evaluators `mmlu`, its four groups and 57 subjects: exam questions (Hendrycks et al. 2021, arXiv:2009.03300).

By default five-shot, as in the paper: the first five questions of the subject's dev split, in their order.
`--num-fewshot 0` is the default of the lm-evaluation-harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import ClassVar

from llmkit import hookimpl
from llmkit.evaldata import Row, TaskData, get, get_strings
from llmkit.evaluator import Document, Evaluator
from llmkit.multiple_choice import MultipleChoice, gold_index

_SUBJECTS = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
}
SUBJECTS = {group: subjects.split() for group, subjects in _SUBJECTS.items()}
GROUP_OF = {subject: group for group, subjects in SUBJECTS.items() for subject in subjects}
LETTERS = "ABCD"


class Mmlu(MultipleChoice):
    """Exam questions of 57 subjects, from law to physics."""

    name = "mmlu"
    version = "1.0"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"acc": True}
    data = TaskData("mmlu/{split}.jsonl", "cais/mmlu", "all")
    fewshot_split = "dev"
    num_fewshot = 5
    normalised = False
    subjects: ClassVar[Sequence[str]] = sorted(GROUP_OF)

    def convert(self, row: Row) -> Document:
        subject, choices = get(row, "subject", str), get_strings(row, "choices")
        if subject not in GROUP_OF:
            raise ValueError(f"field 'subject' is {subject!r}, which is none of the 57")
        if len(choices) != len(LETTERS):
            raise ValueError(f"field 'choices' has {len(choices)} choices, not {len(LETTERS)}")
        lines = [get(row, "question", str).strip(), *(f"{a}. {text}" for a, text in zip(LETTERS, choices)), "Answer:"]
        gold = gold_index(get(row, "answer", int), choices)
        return {"subject": subject, "query": "\n".join(lines), "choices": list(LETTERS), "gold": gold}

    @cached_property
    def _documents(self) -> list[Document]:
        by_subject = self._by_subject(self.split)
        if empty := [subject for subject in self.subjects if not by_subject[subject]]:
            raise ValueError(f"task {self.name!r}: there are no questions about {', '.join(empty)}")
        return _spread([by_subject[subject] for subject in self.subjects])

    @cached_property
    def _dev(self) -> dict[str, list[Document]]:
        return self._by_subject(self.fewshot_split)

    def _by_subject(self, split: str) -> dict[str, list[Document]]:
        found: dict[str, list[Document]] = defaultdict(list)
        for document in self.data.load(split, self.context.data_dir, self.convert, self.files):
            found[document["subject"]].append(document)
        return found

    def examples(self, document: Document) -> Iterable[Document]:
        if not self.shots:
            return []
        pool = [example for example in self._dev[document["subject"]] if example != document]
        if len(pool) < self.shots:
            raise ValueError(f"{self.shots} examples about {document['subject']} are wanted, and there are {len(pool)}")
        return pool[: self.shots]

    def description(self, document: Document) -> str:
        subject = document["subject"].replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {subject}.\n\n"

    def parts(self, document: Document) -> tuple[str, ...]:
        """Of a group its subjects; of all 57 the groups as well."""
        if len(self.subjects) == 1:
            return ()
        subject = document["subject"]
        parts = (f"mmlu_{subject}", f"mmlu_{GROUP_OF[subject]}")
        return tuple(part for part in parts if part != self.name)


def _spread(lists: Sequence[Sequence[Document]]) -> list[Document]:
    """One document of each list, then 3 of each, 12, 48, ...: so that a limit takes some of every subject, and yet
    questions of a subject, whose prompts begin alike, mostly stand together."""
    iterators, spread, count = [iter(documents) for documents in lists], [], 1
    while block := [document for iterator in iterators for document in islice(iterator, count)]:
        spread += block
        count = 3 * (len(spread) // len(lists)) if count == 1 else 4 * count
    return spread


def _task(part: str, subjects: Sequence[str]) -> type[Evaluator]:
    about = part.replace("_", " ")
    summary = f"Exam questions about {about}." if len(subjects) == 1 else f"The {len(subjects)} subjects of {about}."
    fields = {"name": f"mmlu_{part}", "subjects": sorted(subjects), "__doc__": summary, "__module__": __name__}
    return type(f"Mmlu_{part}", (Mmlu,), fields)


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    groups = [_task(group, subjects) for group, subjects in SUBJECTS.items()]
    return [Mmlu, *groups, *(_task(subject, [subject]) for subject in sorted(GROUP_OF))]
