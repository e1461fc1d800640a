"""CoreTask: one task of CORE, and the table of all 22.

A multiple-choice question is answered by the choice with the lowest mean loss of its tokens after those that all
choices have in common, a schema by the context with the lowest mean loss of the common ending, a language-modelling
task by predicting every token of the continuation. Prompts begin with the begin or end-of-text token.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from llmkit.evaldata import MissingData, Row, get, get_strings, json_lines
from llmkit.evaluator import Answer, Document, EvalContext, Evaluator, Likelihood, Request, TokenLogLikelihood
from llmkit.multiple_choice import gold_index

Ids = tuple[int, ...]
ANSWER = "\nAnswer: "
ORDER_SEED, SHOTS_SEED = 1337, 1234
FOLDERS = ("core_eval/eval_data", "core_eval", "eval_bundle/eval_data", "eval_data", ".")


@dataclass(frozen=True, slots=True)
class Spec:
    """A task: its kind, file, examples, the accuracy of guessing, and what stands between question and answer."""

    kind: Literal["choice", "schema", "language"]
    file: str
    shots: int
    guessing: float
    delimiter: str = " "


TASKS = {
    "core_hellaswag_zeroshot": Spec("choice", "language_understanding/hellaswag", 0, 0.25),
    "core_jeopardy": Spec("language", "world_knowledge/jeopardy_all", 10, 0, ANSWER),
    "core_bigbench_qa_wikidata": Spec("language", "world_knowledge/bigbench_qa_wikidata", 10, 0),
    "core_arc_easy": Spec("choice", "world_knowledge/arc_easy", 10, 0.25, ANSWER),
    "core_arc_challenge": Spec("choice", "world_knowledge/arc_challenge", 10, 0.25, ANSWER),
    "core_copa": Spec("choice", "commonsense_reasoning/copa", 0, 0.5),
    "core_commonsense_qa": Spec("choice", "commonsense_reasoning/commonsense_qa", 10, 0.2),
    "core_piqa": Spec("choice", "commonsense_reasoning/piqa", 10, 0.5, ANSWER),
    "core_openbook_qa": Spec("choice", "commonsense_reasoning/openbook_qa", 0, 0.25),
    "core_lambada_openai": Spec("language", "language_understanding/lambada_openai", 0, 0),
    "core_hellaswag": Spec("choice", "language_understanding/hellaswag", 10, 0.25),
    "core_winograd": Spec("schema", "language_understanding/winograd_wsc", 0, 0.5),
    "core_winogrande": Spec("schema", "language_understanding/winogrande", 0, 0.5),
    "core_bigbench_dyck_languages": Spec("language", "symbolic_problem_solving/bigbench_dyck_languages", 10, 0),
    "core_agi_eval_lsat_ar": Spec("choice", "symbolic_problem_solving/agi_eval_lsat_ar", 3, 0.2),
    "core_bigbench_cs_algorithms": Spec("language", "symbolic_problem_solving/bigbench_cs_algorithms", 10, 0),
    "core_bigbench_operators": Spec("language", "symbolic_problem_solving/bigbench_operators", 10, 0),
    "core_bigbench_repeat_copy_logic": Spec("language", "symbolic_problem_solving/bigbench_repeat_copy_logic", 10, 0),
    "core_squad": Spec("language", "reading_comprehension/squad", 10, 0),
    "core_coqa": Spec("language", "reading_comprehension/coqa", 0, 0),
    "core_boolq": Spec("choice", "reading_comprehension/boolq", 10, 0.62, ANSWER),
    "core_bigbench_language_identification": Spec(
        "choice", "language_understanding/bigbench_language_identification", 10, 0.091
    ),
}


class CoreTask(Evaluator):
    """A task of CORE. acc: share of right answers; centered: the same with guessing at 0."""

    version = "1"
    spec: ClassVar[Spec]
    higher_is_better: ClassVar[Mapping[str, bool]] = {"acc": True, "centered": True}

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        if context.chat is not None:
            raise ValueError(f"task {self.name!r} is for base models: leave --apply-chat-template out")
        tokenizer = context.tokenizer
        begin = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        if begin is None:
            raise ValueError(f"task {self.name!r}: the tokenizer has neither a begin nor an end-of-text token")
        self._begin: Ids = (begin,)

    def path(self) -> Path:
        """The task's file. Raises MissingData where there is none."""
        if "test" in self.files:
            return self.files["test"]
        folder, name = self.context.data_dir, f"{self.spec.file}.jsonl"
        if folder is None:
            raise MissingData(
                f"task {self.name!r} reads nanochat's eval_bundle: unpack it and name its folder with --data-dir"
            )
        paths = [folder / place / name for place in FOLDERS]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise MissingData(f"there is no {name} in {folder} or its {', '.join(FOLDERS[:-1])}")
        return found

    def documents(self) -> Sequence[Document]:
        return self._items

    @cached_property
    def _items(self) -> list[Document]:
        """All items in nanochat's order: shuffled, since files are sorted in ways that would bias a limit."""
        items = []
        for place, row in json_lines(self.path()):
            try:
                items.append(_checked(row, self.spec.kind))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        random.Random(ORDER_SEED).shuffle(items)
        return [{"index": index, **item} for index, item in enumerate(items)]

    def examples(self, document: Document) -> list[Document]:
        """Other items of the same file, drawn by the place of the document."""
        if not self.shots:
            return []
        others = [index for index in range(len(self._items)) if index != document["index"]]
        if len(others) < self.shots:
            raise ValueError(f"{self.shots} examples are wanted, and there are {len(others)} other items")
        drawn = random.Random(SHOTS_SEED + document["index"]).sample(others, self.shots)
        return [self._items[index] for index in drawn]

    def requests(self, document: Document) -> list[Request]:
        before = "".join(f"{self._text(shot)}\n\n" for shot in self.examples(document))
        prompts = [before + text for text in self._options(document)]
        encoded = [self._begin + tuple(self.context.tokenizer.encode(prompt)) for prompt in prompts]
        if self.spec.kind == "language":
            bare = (before + self._stem(document) + self.spec.delimiter).strip()
            encoded.append(self._begin + tuple(self.context.tokenizer.encode(bare)))
        shortest = min(map(len, encoded[: len(prompts)]))
        if self.spec.kind == "schema":
            ending = min(_common([ids[::-1] for ids in encoded]), shortest - 1)
            starts = [len(ids) - ending for ids in encoded]
        else:
            # where one option is the beginning of another, its last token is left to ask for
            starts = [min(_common(encoded), shortest - 1)] * len(encoded)
        return [TokenLogLikelihood(ids[:start], ids[start:]) for ids, start in zip(encoded[: len(prompts)], starts)]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, Any]:
        if self.spec.kind == "language":
            right = all(isinstance(answer, Likelihood) and answer.is_greedy for answer in answers)
        else:
            losses = [-answer.logprob / answer.tokens for answer in answers if isinstance(answer, Likelihood)]
            right = losses.index(min(losses)) == document["gold"]
        return {"acc": float(right), "centered": (right - self.spec.guessing) / (1 - self.spec.guessing)}

    def _stem(self, item: Document) -> str:
        return str(item["context"]).strip()

    def _options(self, item: Document) -> list[str]:
        """The item with each of its answers, of which one is right."""
        between = self.spec.delimiter
        if self.spec.kind == "choice":
            return [f"{item['query']}{between}{choice}" for choice in item["choices"]]
        if self.spec.kind == "schema":
            return [f"{context}{between}{item['continuation']}" for context in item["context_options"]]
        return [f"{self._stem(item)}{between}{item['continuation']}"]

    def _text(self, item: Document) -> str:
        """The item with its right answer, as an example."""
        return self._options(item)[item.get("gold", 0)]


def make_task(name: str, spec: Spec) -> type[CoreTask]:
    about = name.removeprefix("core_").replace("_", " ")
    fields = {"name": name, "spec": spec, "num_fewshot": spec.shots, "__doc__": f"Task {about} of CORE."}
    return type(name, (CoreTask,), {**fields, "__module__": __name__})


def _checked(row: Row, kind: str) -> dict[str, Any]:
    """The fields that the task reads. Raises ValueError naming one that is missing or wrong."""
    if kind == "choice":
        choices = get_strings(row, "choices")
        return {"query": get(row, "query", str), "choices": choices, "gold": gold_index(get(row, "gold", int), choices)}
    if kind == "schema":
        options = get_strings(row, "context_options")
        continuation, gold = get(row, "continuation", str), gold_index(get(row, "gold", int), options)
        return {"context_options": options, "continuation": continuation, "gold": gold}
    return {"context": get(row, "context", str), "continuation": get(row, "continuation", str)}


def _common(sequences: Sequence[Ids]) -> int:
    """How many ids all sequences begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)
