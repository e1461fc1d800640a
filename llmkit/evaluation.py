"""Evaluation: runs tasks on a checkpoint and puts their results together, in lm-eval's form.

Documents are taken in waves of bounded size, of all tasks in turn; the requests of a wave go to the engine together, so
that it can batch them as it likes, and each document is scored as soon as its last answer is there.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import __version__
from llmkit.component import require
from llmkit.eval_requests import Encoder, OpenDocument, Wave
from llmkit.evaluator import Answer, Document, EvalContext, Evaluator, Likelihood, Metric, Request, Suite, pooled
from llmkit.plugins import get_plugins

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.engine import Engine
    from llmkit.eval_cache import AnswerCache
    from llmkit.eval_chat import Chat

WAVE_TOKENS = 2**20  # about 40 MB of Python integers
FIRST_WAVE_TOKENS = 2**16  # a small one, so that the first results come soon
WAVE_DOCUMENTS = 2**14


@dataclass(frozen=True, slots=True)
class Sample:
    """A document of a task with what was asked, what the model answered, and its figures."""

    task: str
    index: int
    document: Document
    requests: Sequence[Request]
    answers: Sequence[Answer]
    scores: Mapping[str, float]
    parts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A line of the samples file, with lm-eval's names."""
        return {
            "task": self.task,
            "doc_id": self.index,
            "doc": dict(self.document),
            "arguments": [asdict(request) for request in self.requests],
            "resps": [asdict(answer) if isinstance(answer, Likelihood) else answer for answer in self.answers],
            "scores": dict(self.scores),
            **({"parts": list(self.parts)} if self.parts else {}),
        }


class Evaluation:
    """One run of some tasks on one checkpoint.

    Attributes:
        tasks: name -> evaluator, in the order asked for; a suite's members in its place.
        suites: name -> suite.
        truncated: task -> documents that were too long for the model's context and lost their left end.
        cached: answers that were there from before.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tasks: Sequence[str],
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        data_dir: Path | None = None,
        seed: int = 1234,
        options: Mapping[str, str] | None = None,
        chat: Chat | None = None,
        task_data: Mapping[str, Mapping[str, Path]] | None = None,
    ) -> None:
        """Set up the tasks; the model is not needed yet.

        `limit` takes the first so many documents of each task; `chat` asks a chat model in its own format;
        `task_data` has files for single tasks, task -> split -> file. Raises UnknownComponent with the nearest names,
        MissingRequirement, or ValueError from a task.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        found = {name: get_plugins().evaluator(name) for name in tasks}
        self.checkpoint, self.limit, self.num_fewshot, self.seed = checkpoint, limit, num_fewshot, seed
        self.chat = chat
        context = EvalContext(
            checkpoint, checkpoint.tokenizer, data_dir, num_fewshot, seed, dict(options or {}), chat, task_data or {}
        )
        self.tasks: dict[str, Evaluator] = {}
        self.suites: dict[str, Suite] = {}
        self._members: dict[str, list[str]] = {}
        for name, evaluator in found.items():
            require(evaluator.requires, f"task {name!r}")
            task = evaluator(context)
            if isinstance(task, Suite):
                self.suites[name], members = task, task.members()
                self._members[name] = list(members)
                for member, made in members.items():
                    self.tasks.setdefault(member, made)
            else:
                self.tasks[name] = task
        for name in context.task_data:
            if name not in self.tasks and f"lm_eval:{name}" not in self.tasks:
                among = ", ".join(self.tasks)
                raise ValueError(f"there is data for task {name!r}, which is not among the tasks: {among}")
        self.truncated: dict[str, int] = dict.fromkeys(self.tasks, 0)
        self._scores: dict[str, dict[int, Mapping[str, float]]] = {name: {} for name in self.tasks}
        self._parts: dict[str, dict[int, tuple[str, ...]]] = {name: {} for name in self.tasks}
        self._documents = {name: task.documents() for name, task in self.tasks.items()}
        self._engine: Engine | None = None
        self._seconds = 0.0
        self.cached = 0

    @property
    def total(self) -> int | None:
        """How many documents there are to do, where the tasks know it."""
        counts = [len(documents) if isinstance(documents, Sized) else None for documents in self._documents.values()]
        known = [min(count, self.limit or count) for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def run(self, engine: Engine, cache: AnswerCache | None = None) -> Iterator[Sample]:
        """Samples as their documents finish, in any order. Raises ValueError naming the task and document at fault.

        What `cache` has is not asked again. Tasks that score in threads do so while the engine goes on.
        """
        self._engine = engine
        started = time.perf_counter()
        scoring: dict[Future[dict[str, float]], OpenDocument] = {}
        pool = ThreadPoolExecutor(os.cpu_count() or 1)  # starts its threads when they are needed
        try:
            for finished in self._finished(engine, cache):
                if self.tasks[finished.task].scores_in_threads:
                    scoring[pool.submit(self._score, finished)] = finished
                else:
                    yield self._sample(finished, self._score(finished))
                for future in [future for future in scoring if future.done()]:
                    yield self._sample(scoring.pop(future), future.result())
                self._seconds = time.perf_counter() - started
            for future, finished in scoring.items():
                yield self._sample(finished, future.result())
            self._seconds = time.perf_counter() - started
        finally:
            pool.shutdown(cancel_futures=True)

    def _finished(self, engine: Engine, cache: AnswerCache | None) -> Iterator[OpenDocument]:
        """Documents with all their answers."""
        encoder = Encoder(self.checkpoint.tokenizer, engine.context_length)
        wave, most = Wave(encoder, self.seed, cache), min(FIRST_WAVE_TOKENS, WAVE_TOKENS)
        for name in self.tasks:
            for index, document in enumerate(self._limited(name)):
                wave.add(OpenDocument(name, index, document, self._requests(name, index, document)))
                if wave.tokens >= most or wave.documents >= WAVE_DOCUMENTS:
                    yield from self._run_wave(wave, engine)
                    wave, most = Wave(encoder, self.seed, cache), WAVE_TOKENS
        if wave.documents:
            yield from self._run_wave(wave, engine)

    def _run_wave(self, wave: Wave, engine: Engine) -> Iterator[OpenDocument]:
        yield from wave.run(engine)
        self.cached += wave.cached

    def _requests(self, name: str, index: int, document: Document) -> list[Request]:
        requests = self.tasks[name].requests(document)
        if self.chat is None:
            return requests
        try:
            return self.chat.requests(requests)
        except ValueError as error:
            raise ValueError(f"task {name!r}, document {index}: {error}") from None

    def _limited(self, name: str) -> Iterable[Document]:
        return islice(self._documents[name], self.limit)

    def _score(self, finished: OpenDocument) -> dict[str, float]:
        return self.tasks[finished.task].score(finished.document, finished.answers())

    def _sample(self, finished: OpenDocument, scores: Mapping[str, float]) -> Sample:
        self._scores[finished.task][finished.index] = scores
        parts = self._parts[finished.task][finished.index] = self.tasks[finished.task].parts(finished.document)
        self.truncated[finished.task] += finished.truncated
        answers = finished.answers()
        return Sample(finished.task, finished.index, finished.document, finished.requests, answers, scores, parts)

    def running(self, task: str) -> dict[str, float]:
        """The task's metrics over the documents that are finished."""
        return dict(self.tasks[task].running(list(self._scores[task].values())))

    def metrics(self, task: str) -> dict[str, Metric]:
        """The task's metrics. Raises ValueError where it had no documents, or a metric is not a finite number."""
        return self._figures(task)[task][0]

    def _figures(self, task: str) -> dict[str, tuple[dict[str, Metric], int]]:
        """Metrics and number of documents of the task and then of each of its parts."""
        by_index, parts = self._scores[task], self._parts[task]
        if not by_index:
            raise ValueError(f"task {task!r} has no documents")
        members: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
        for index in sorted(by_index):
            members.setdefault(parts[index], []).append(by_index[index])
        smallest = {names: (self.tasks[task].aggregate(scores), len(scores)) for names, scores in members.items()}
        for metrics, _ in smallest.values():
            for name, metric in metrics.items():
                if not math.isfinite(metric.value):
                    raise ValueError(f"task {task!r}: {name} is {metric.value}, so the model's outputs are not usable")
        figures = {task: _together(list(smallest.values()))}
        for part in sorted({name for names in smallest for name in names}):
            figures[part] = _together([found for names, found in smallest.items() if part in names])
        return figures

    def results(self) -> dict[str, Any]:
        """Everything about the finished run, in lm-eval's schema: what `llmkit eval --json` prints."""
        assert self._engine is not None
        results: dict[str, dict[str, float]] = {}
        owners: dict[str, Evaluator] = {}
        figures = {name: self._figures(name) for name in self.tasks}
        for name, task in self.tasks.items():
            for part, (metrics, n) in figures[name].items():
                if part != name and part in self.tasks:
                    continue  # it was asked for, with documents of its own
                results[part] = {**_flat(metrics), "n": n}
                owners[part] = task
        for name, suite in self.suites.items():
            members = {member: figures[member][member] for member in self._members[name]}
            for line, (metrics, n) in suite.summary_figures(members).items():
                results[line] = {**_flat(metrics), "n": n}
                owners[line] = suite
        return {
            "results": results,
            "versions": {name: task.version for name, task in owners.items()},
            "n-shot": {name: task.shots for name, task in owners.items() if not isinstance(task, Suite)},
            "higher_is_better": {name: dict(task.higher_is_better) for name, task in owners.items()},
            "n-samples": {name: self._sizes(name, int(row["n"])) for name, row in results.items()},
            "group_subtasks": self._subtasks(),
            "missing": {name: suite.missing for name, suite in self.suites.items() if suite.missing},
            "truncated": self.truncated,
            "config": {
                "checkpoint": str(self.checkpoint.path),
                "architecture": self.checkpoint.architecture,
                "step": self.checkpoint.step,
                "engine": self._engine.name,
                "dtype": self._engine.dtype,
                "context_length": self._engine.context_length,
                "limit": self.limit,
                "num_fewshot": self.num_fewshot,
                "seed": self.seed,
                "apply_chat_template": self.chat is not None,
                "system_prompt": self.chat.system_prompt if self.chat else None,
                "fewshot_as_turns": self.chat.fewshot_as_turns if self.chat else False,
                "llmkit_version": __version__,
            },
            "cached": self.cached,
            "seconds": round(self._seconds, 3),
        }

    def _sizes(self, name: str, n: int) -> dict[str, int]:
        """How many documents there are, where that is known, and how many of them were taken."""
        documents = self._documents.get(name)
        return {"original": len(documents) if isinstance(documents, Sized) else n, "effective": n}

    def _subtasks(self) -> dict[str, list[str]]:
        """Suite -> members, task -> its largest parts, part -> the parts in it."""
        found: dict[str, set[str]] = {name: set(members) for name, members in self._members.items()}
        for name, by_index in self._parts.items():
            for parts in set(by_index.values()):
                for part, whole in pairwise((*parts, name)):
                    found.setdefault(whole, set()).add(part)
        return {name: sorted(parts) for name, parts in found.items()}

    @property
    def lm_eval_names(self) -> dict[str, Mapping[str, str]]:
        """Task -> metric -> lm-eval's name."""
        return {name: task.lm_eval_names for name, task in self.tasks.items()}


def _together(parts: Sequence[tuple[dict[str, Metric], int]]) -> tuple[dict[str, Metric], int]:
    """Metrics and number of documents of several parts as one."""
    if len(parts) == 1:
        return parts[0]
    sizes = [n for _, n in parts]
    return {name: pooled([metrics[name] for metrics, _ in parts], sizes) for name in parts[0][0]}, sum(sizes)


def _flat(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """`acc` and `acc_stderr`."""
    figures: dict[str, float] = {}
    for name, metric in metrics.items():
        figures[name] = metric.value
        if metric.stderr is not None:
            figures[f"{name}_stderr"] = metric.stderr
    return figures
