"""Evaluators `core`, its 22 tasks `core_<task>`, and `chatcore`: the figures by which nanochat compares models.

CORE is the centred accuracy of the DCLM paper (Li et al. 2024, arXiv:2406.11794), scored as nanochat does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from llmkit import hookimpl
from llmkit.evaldata import MissingData
from llmkit.evaluator import EvalContext, Evaluator, Figures, Metric, Suite
from llmkit.plugins import get_plugins
from llmkit_core.tasks import TASKS, CoreTask, make_task

CORE_TASKS: dict[str, type[CoreTask]] = {name: make_task(name, spec) for name, spec in TASKS.items()}

#: task -> (its figure, the accuracy of guessing)
CHATCORE = {
    "arc_easy": ("acc", 0.25),
    "arc_challenge": ("acc", 0.25),
    "mmlu": ("acc", 0.25),
    "gsm8k": ("exact_match", 0.0),
    "humaneval": ("pass@1", 0.0),
}


class CentredMean(Suite):
    """The plain mean of the centred figures of some tasks; called partial where data for one is missing."""

    def _mean(self, centred: Mapping[str, Metric], n: int) -> dict[str, Figures]:
        count = len(centred)
        value = math.fsum(metric.value for metric in centred.values()) / count
        errors = [metric.stderr for metric in centred.values() if metric.stderr is not None]
        error = math.hypot(*errors) / count if len(errors) == count else None
        return {self.name: ({f"{self.name}_partial" if self.missing else self.name: Metric(value, error)}, n)}


class Core(CentredMean):
    """Mean of 22 tasks for base models, each centred so that guessing is 0 and perfection 1."""

    name = "core"
    version = "1"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"core": True, "core_partial": True}

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        if context.num_fewshot is not None:
            raise ValueError("task 'core' says itself how many examples each of its tasks has: leave --num-fewshot out")

    def members(self) -> dict[str, Evaluator]:
        found: dict[str, Evaluator] = {}
        for name, task in CORE_TASKS.items():
            member = task(self.context)
            try:
                member.path()
            except MissingData as error:
                self.missing[name] = str(error)
            else:
                found[name] = member
        if not found:
            raise ValueError(f"task 'core' has no data: {next(iter(self.missing.values()))}")
        return found

    def summary_figures(self, figures: Mapping[str, Figures]) -> dict[str, Figures]:
        centred = {name: metrics["centered"] for name, (metrics, _) in figures.items()}
        return self._mean(centred, sum(n for _, n in figures.values()))


class ChatCore(CentredMean):
    """Mean of arc_easy, arc_challenge, mmlu, gsm8k and humaneval, centred, for chat models."""

    name = "chatcore"
    version = "1"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"chatcore": True, "chatcore_partial": True}

    def members(self) -> dict[str, Evaluator]:
        found: dict[str, Evaluator] = {}
        for name in CHATCORE:
            # programs have no examples, whatever the user wants for the others
            context = replace(self.context, num_fewshot=None) if name == "humaneval" else self.context
            task = get_plugins().evaluator(name)(context)
            try:
                task.documents()
            except MissingData as error:
                self.missing[name] = str(error)
            else:
                found[name] = task
        if not found:
            raise ValueError(f"task 'chatcore' has no data: {next(iter(self.missing.values()))}")
        return found

    def summary_figures(self, figures: Mapping[str, Figures]) -> dict[str, Figures]:
        centred = {}
        for name, (metrics, _) in figures.items():
            metric, guessing = CHATCORE[name]
            found = metrics[metric]
            error = None if found.stderr is None else found.stderr / (1 - guessing)
            centred[name] = Metric((found.value - guessing) / (1 - guessing), error)
        return self._mean(centred, sum(n for _, n in figures.values()))


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [Core, ChatCore, *CORE_TASKS.values()]
