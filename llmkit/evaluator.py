"""Evaluator: one evaluation task. It says what to ask a model and how to score the answers.

The runner (`llmkit.evaluation`) tokenises, batches, feeds the engine, aggregates and reports, so that a task is its
documents, its prompts and its metric, and little else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.component import Component

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.eval_chat import Chat
    from llmkit.tokenizer import Tokenizer

Document = Mapping[str, Any]


class Prompt(str):
    """A prompt that knows its parts: plain text by itself, and for a chat model what its conversation is made of.

    As text it is the description, each example with a space and its answer and an empty line, and the question.

    Attributes:
        question: what is asked.
        shots: (question, answer) of each example.
        description: what stands in front of everything.
    """

    question: str
    shots: tuple[tuple[str, str], ...]
    description: str

    def __new__(cls, question: str, shots: Iterable[tuple[str, str]] = (), description: str = "") -> Prompt:
        shots = tuple(shots)
        examples = "".join(f"{asked} {answer}\n\n" for asked, answer in shots)
        prompt = super().__new__(cls, description + examples + question)
        prompt.question, prompt.shots, prompt.description = question, shots, description
        return prompt


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Ask for ln p(continuation | context). Answer: Likelihood.

    An empty context becomes the tokenizer's begin or end-of-text token; trailing spaces of the context count as part
    of the continuation, as in lm-eval. A context that is too long loses its left end. Where the model is asked in its
    chat format, the continuation loses the space in front.
    """

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class RollingLogLikelihood:
    """Ask for ln p(text) as a whole, in disjoint windows of the model's context. Answer: Likelihood."""

    text: str


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for a continuation of the prompt, cut before the first of the `stop` strings. Answer: str.

    Greedy at temperature 0, which is the default here. A prompt that is too long loses its left end.
    """

    prompt: str
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenLogLikelihood:
    """`LogLikelihood` in token ids, for tasks that must place the boundary between tokens themselves.

    Nothing is added, and no chat template applied; neither may be empty. A context that is too long loses its left end.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


Request = LogLikelihood | TokenLogLikelihood | RollingLogLikelihood | Generate


@dataclass(frozen=True, slots=True)
class Likelihood:
    """`logprob` in nats, summed over `tokens` tokens; `is_greedy`: each of them was the model's first choice."""

    logprob: float
    is_greedy: bool
    tokens: int


Answer = Likelihood | str


@dataclass(frozen=True)
class EvalContext:
    """What a task may need to know of the run. `data_dir` holds local data; None means the task's usual place.

    `task_data` names files for single tasks: task -> split -> file. They come before `data_dir`.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    data_dir: Path | None = None
    num_fewshot: int | None = None  # None: the task's default
    seed: int = 1234
    options: Mapping[str, str] = field(default_factory=dict)
    chat: Chat | None = None  # the format of a chat model; the runner applies it to the prompts of every task
    task_data: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a task's results; `stderr` is None where it has no meaning."""

    value: float
    stderr: float | None = None


def mean(values: Sequence[float]) -> Metric:
    """Mean with its standard error, sample standard deviation / sqrt(n)."""
    n = len(values)
    average = math.fsum(values) / n
    if n < 2:
        return Metric(average)
    variance = math.fsum((value - average) ** 2 for value in values) / (n - 1)
    return Metric(average, math.sqrt(variance / n))


def pooled(metrics: Sequence[Metric], sizes: Sequence[int]) -> Metric:
    """Mean of `metrics`, each from so many documents, by size; its standard error is that of the pooled variance.

    Variance sum((n_i - 1) n_i se_i^2) / (N - k) over k metrics, as lm-eval has it; None where every size is 1.
    """
    total = sum(sizes)
    value = math.fsum(metric.value * n for metric, n in zip(metrics, sizes)) / total
    if total == len(sizes):
        return Metric(value)
    spread = math.fsum((n - 1) * n * (metric.stderr or 0.0) ** 2 for metric, n in zip(metrics, sizes))
    return Metric(value, math.sqrt(spread / (total - len(sizes)) / total))


class Evaluator(Component, ABC):
    """A task.

    Class attributes:
        version: raised whenever prompts, data or scoring change; it is part of the results.
        higher_is_better: metric -> direction, for reports.
        num_fewshot: how many examples stand before the question where the user does not say.
        lm_eval_names: metric -> its name in lm-eval's results, where that is not `metric,none`.
        scores_in_threads: `score` waits for other programs, so it is called in threads while the model goes on.
    """

    version: ClassVar[str] = "1"
    higher_is_better: ClassVar[Mapping[str, bool]] = {}
    num_fewshot: ClassVar[int] = 0
    lm_eval_names: ClassVar[Mapping[str, str]] = {}
    scores_in_threads: ClassVar[bool] = False

    def __init__(self, context: EvalContext) -> None:
        self.context = context
        self.shots = self.num_fewshot if context.num_fewshot is None else context.num_fewshot
        self.files = context.task_data.get(self.name, {})

    @abstractmethod
    def documents(self) -> Iterable[Document]:
        """The documents, always in the same order. Raises ValueError, saying what is missing and where."""

    @abstractmethod
    def requests(self, document: Document) -> list[Request]:
        """What to ask about a document; prompts depend on the document alone, not on its neighbours.

        A `Prompt` tells examples and question apart, which `--fewshot-as-turns` needs; any other string is one message
        to a chat model.
        """

    @abstractmethod
    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, Any]:
        """Figures of one document from the answers, in the order of its requests.

        Numbers; where a task has its own `aggregate`, anything that JSON can hold.
        """

    def parts(self, document: Document) -> tuple[str, ...]:
        """Parts of the task that a document counts for, the smallest first; each has figures of its own in the results.

        A task with parts is put together from its smallest ones: the mean by their sizes, with pooled standard error.
        """
        return ()

    def aggregate(self, scores: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
        """Results of the task, or of a part, from the figures of its documents: by default the mean of each."""
        return {name: mean([score[name] for score in scores]) for name in scores[0]} if scores else {}

    def running(self, scores: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
        """What the progress bar shows after some documents."""
        for name, metric in self.aggregate(scores).items():
            yield name, metric.value


Figures = tuple[dict[str, Metric], int]  # metrics of a task, and how many documents they are of


class Suite(Evaluator):
    """A task that is made of other tasks: they are run, each with results of its own, and it sums these up.

    Attributes:
        missing: task that belongs to the suite -> why it is not run.
    """

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.missing: dict[str, str] = {}

    @abstractmethod
    def members(self) -> Mapping[str, Evaluator]:
        """Its tasks by name, set up. Raises ValueError where there is none that can be run."""

    @abstractmethod
    def summary_figures(self, figures: Mapping[str, Figures]) -> Mapping[str, Figures]:
        """Lines of the results, by name, from the figures of its members."""

    def documents(self) -> Iterable[Document]:
        return ()

    def requests(self, document: Document) -> list[Request]:
        raise NotImplementedError("a suite asks nothing itself")

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, Any]:
        raise NotImplementedError("a suite asks nothing itself")


class TaskFamily(Component, ABC):
    """Tasks that are too many to be registered one by one, made when they are asked for.

    They are asked for by name where no registered task has it, and as `family:name` in any case.
    """

    @classmethod
    @abstractmethod
    def names(cls) -> Collection[str]:
        """The names of its tasks, for suggestions; empty where what it `requires` is not installed."""

    @classmethod
    @abstractmethod
    def find(cls, name: str) -> type[Evaluator] | None:
        """The task of that name, or None. It may be a `Suite`."""
