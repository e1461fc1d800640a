"""Tasks and groups of lm-eval as evaluators: lm-eval makes prompts and figures, llmkit's runner does the rest."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from llmkit.evaluator import (
    Answer,
    Document,
    EvalContext,
    Evaluator,
    Figures,
    Generate,
    Likelihood,
    LogLikelihood,
    Metric,
    Request,
    RollingLogLikelihood,
    Suite,
)
from llmkit.plugins import get_plugins
from llmkit_lm_eval.data import use_local_data
from llmkit_lm_eval.index import Entry, load_index, tasks_folder

BOOTSTRAP = 1000  # resamples for the standard error of what is not a mean; lm-eval takes 100,000, for minutes
MAX_TOKENS = 256  # of an answer where the task does not say
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
UNDERSTOOD = {"until", "do_sample", "temperature", "top_p", *TOKEN_LIMITS}
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "top_k": 0}


def find_task(name: str) -> type[Evaluator] | None:
    """The evaluator class for a name of lm-eval's, or for a YAML file like its own; None where there is none."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return type("LmEvalFile", (LmEvalTask,), {"name": name, "__doc__": f"Task of lm-eval in {name}."})
    entry = load_index().get(name)
    if entry is None:
        return None
    base, word = (LmEvalGroup, "Group") if entry.kind in ("GROUP", "TAG") else (LmEvalTask, "Task")
    return type(f"LmEval_{name}", (base,), {"name": name, "__doc__": f"{word} {name} of lm-eval."})


class LmEvalTask(Evaluator):
    """A task of lm-eval.

    Prompts, examples, filters, metrics and their aggregation are lm-eval's. Examples are drawn in the order of the
    documents, as there, so that they are the same whatever `--limit` is and whatever was answered before.
    """

    requires: ClassVar[tuple[str, ...]] = ("lm_eval",)

    def __init__(self, context: EvalContext, task: Any = None) -> None:
        """`task` is lm-eval's, where a group has made it."""
        super().__init__(context)
        self.task = _build(self.name, context) if task is None else task
        _check_runs(self.task, context)
        self.shots = int(self.task.get_config("num_fewshot") or 0)
        self.version = f"{self.task.VERSION} (lm-eval {_lm_eval_version()})"  # type: ignore[misc]
        self._directions = dict(self.task.higher_is_better())

    def documents(self) -> Iterable[Document]:
        return _Documents(self)

    def requests(self, document: Document) -> list[Request]:
        assert isinstance(document, LmEvalDocument)
        return [_request(instance) for instance in self._instances(document) for _ in range(_repeats(instance))]

    def _instances(self, document: LmEvalDocument) -> list[Any]:
        """What lm-eval asks about a document."""
        chat = self.context.chat
        repeats = self.task.get_config("repeats") or 1
        made = self.task.construct_requests(
            doc=document.doc,
            ctx=document.prompt,
            metadata=(self.name, document.index, repeats),
            apply_chat_template=chat is not None,
            chat_template=chat and chat.render_messages,
        )
        return made if isinstance(made, list) else [made]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, Any]:
        assert isinstance(document, LmEvalDocument)
        instances = self._instances(document)
        rest = iter(answers)
        for instance in instances:
            instance.resps = [_response(instance, next(rest)) for _ in range(_repeats(instance))]
        for ensemble in self.task._filters:
            ensemble.apply(instances)
        scores: dict[str, Any] = {}
        for filter_name in instances[0].filtered_resps:
            responses = [instance.filtered_resps[filter_name] for instance in instances]
            for metric, value in self.task.process_results(document.doc, responses).items():
                scores[_label(metric, filter_name)] = _plain(value)
        return scores

    def aggregate(self, scores: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
        """By lm-eval's functions, over the documents that have the figure."""
        from lm_eval.api.metrics import mean, stderr_for_metric

        metrics = {}
        for label in dict.fromkeys(label for score in scores for label in score):
            values = [score[label] for score in scores if label in score]
            function = self.task.aggregation().get(_metric(label), mean)
            value = function(values)
            if not isinstance(value, int | float) and not hasattr(value, "item"):
                continue  # a table or a text, which some tasks make beside their figures
            error = stderr_for_metric(function, BOOTSTRAP) if len(values) > 1 else None
            with contextlib.redirect_stdout(sys.stderr):  # the bootstrap talks
                metrics[label] = Metric(float(value), None if error is None else float(error(values)))
        return metrics

    def running(self, scores: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
        """Means of what is a number."""
        for label, value in (scores[0] if scores else {}).items():
            values = [score[label] for score in scores if label in score]
            if isinstance(value, int | float):
                yield label, sum(values) / len(values)

    @property
    def higher_is_better(self) -> Mapping[str, bool]:  # type: ignore[override]
        """Of metrics and, where a task has several filters, of their labels."""
        names = [ensemble.name for ensemble in self.task._filters]
        return {_label(metric, name): better for metric, better in self._directions.items() for name in names}


class LmEvalDocument(dict[str, Any]):
    """A document with its place and its prompt: the examples in it depend on the documents before."""

    def __init__(self, index: int, doc: Any, prompt: Any) -> None:
        super().__init__(doc if isinstance(doc, Mapping) else {"doc": doc})
        self.index, self.doc, self.prompt = index, doc, prompt


class _Documents:
    """The documents of a task, with prompts as lm-eval makes them one after the other."""

    def __init__(self, evaluator: LmEvalTask) -> None:
        self._evaluator = evaluator
        self._docs = evaluator.task.eval_docs

    def __len__(self) -> int:
        return len(self._docs)

    def __iter__(self) -> Iterator[LmEvalDocument]:
        evaluator, task = self._evaluator, self._evaluator.task
        chat = evaluator.context.chat
        task.set_fewshot_seed(seed=evaluator.context.seed)
        for index, doc in enumerate(self._docs):
            prompt = task.fewshot_context(
                doc,
                num_fewshot=evaluator.shots,
                system_instruction=(chat.system_prompt or None) if chat else None,
                apply_chat_template=chat is not None,
                fewshot_as_multiturn=bool(chat and chat.fewshot_as_turns),
                chat_template=chat and chat.render_messages,
                gen_prefix=task.doc_to_prefix(doc),
            )
            yield LmEvalDocument(index, doc, prompt)


class LmEvalGroup(Suite):
    """A group of lm-eval's tasks, with the mean that it defines; or a tag, which has none."""

    requires: ClassVar[tuple[str, ...]] = ("lm_eval",)

    def members(self) -> dict[str, Evaluator]:
        built = _build(self.name, self.context)
        self._groups: list[Any] = [] if isinstance(built, list) else [built, *built.get_all_groups()]
        members: dict[str, Evaluator] = {}
        self._names: dict[str, str] = {}  # lm-eval's name -> ours
        for task in built if isinstance(built, list) else built.get_all_tasks():
            name = task.task_name
            evaluator = type(f"LmEval_{name}", (LmEvalTask,), {"name": name})
            self._names[name] = _own_name(name)
            members[self._names[name]] = evaluator(self.context, task)
        self._directions = {label: up for task in members.values() for label, up in task.higher_is_better.items()}
        self.version = str(self._groups[0].version) if self._groups else ""  # type: ignore[misc]
        return members

    def summary_figures(self, figures: Mapping[str, Figures]) -> dict[str, Figures]:
        tasks: dict[str, dict[str, Any]] = {}
        for name, own in self._names.items():
            metrics, n = figures[own]
            tasks[name] = {"sample_len": n}
            for label, metric in metrics.items():
                kind, _, part = label.partition(",")
                tasks[name][f"{kind},{part or 'none'}"] = metric.value
                tasks[name][f"{kind}_stderr,{part or 'none'}"] = "N/A" if metric.stderr is None else metric.stderr
        lines = {}
        for group in self._groups:
            found = group.aggregate(tasks)
            metrics = {}
            for key, value in found.items():
                kind, _, filter_name = key.partition(",")
                if filter_name and not kind.endswith("_stderr"):
                    error = found.get(f"{kind}_stderr,{filter_name}")
                    metrics[_label(kind, filter_name)] = Metric(value, error if isinstance(error, float) else None)
            if metrics:
                lines[_own_name(group.name)] = (metrics, found["sample_len"])
        return lines

    @property
    def higher_is_better(self) -> Mapping[str, bool]:  # type: ignore[override]
        return self._directions


def _own_name(name: str) -> str:
    """What a task or group of lm-eval's is called in the results: llmkit's own of the same name has that alone."""
    return f"lm_eval:{name}" if name in get_plugins().names("evaluator") else name


def _build(name: str, context: EvalContext) -> Any:
    """lm-eval's object for a name: a Task, a Group, or for a tag a list of tasks. Raises ValueError where it cannot."""
    _prepare(offline=context.data_dir is not None)
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._index import Kind, TaskIndex

    class LocalFactory(TaskFactory):  # type: ignore[misc]
        """Makes tasks that read the user's files and show as many examples as the user wants."""

        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
            if entry.kind is Kind.GROUP:
                return config
            default = config.get("num_fewshot")
            # a task that says 0 has a prompt that takes no examples
            shots = default if context.num_fewshot is None or default == 0 else context.num_fewshot
            if context.num_fewshot and default == 0:
                print(f"llmkit: task {config['task']!r} of lm-eval takes no examples", file=sys.stderr)
            return use_local_data({**config, "num_fewshot": shots or 0}, context, shots or 0)

    registry = _registry()
    entry = TaskIndex.entry_from_path(Path(name)) if name.endswith((".yaml", ".yml")) else registry[name]
    try:
        return LocalFactory().build(entry, registry=dict(registry))
    except ValueError:
        raise
    except Exception as error:  # YAML, the hub, a task's own code and its templates raise many kinds
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        local = f"give local files with --task-data {name}=SPLIT:FILE or --data-dir"
        raise ValueError(
            f"task {name!r} of lm-eval cannot be set up ({type(error).__name__}: {reason}): "
            f"check the network, or {local}"
        ) from error


def _prepare(*, offline: bool) -> None:
    """Before lm-eval is imported: nothing is fetched where data is local, and only faults are talked about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _check_runs(task: Any, context: EvalContext) -> None:
    """Raise ValueError for a task that cannot be run here, or must not be without the user's word."""
    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"task {name!r} shows pictures or sound, and the engines read text alone")
    if getattr(task, "UNSAFE_CODE", False) and context.options.get("unsafe_execute") != "yes":
        raise ValueError(
            f"task {name!r} of lm-eval runs what the model writes, without a sandbox: say --unsafe-execute "
            "(llmkit's own humaneval has a sandbox)"
        )
    settings = task.get_config("generation_kwargs") or {}
    foreign = [key for key in settings if key not in UNDERSTOOD and settings[key] != WITHOUT_EFFECT.get(key, ...)]
    if foreign and task.OUTPUT_TYPE == "generate_until":
        raise ValueError(f"task {name!r} of lm-eval generates with {', '.join(foreign)}, which engines do not have")


def _request(instance: Any) -> Request:
    kind, arguments = instance.request_type, instance.args
    if kind == "loglikelihood":
        return LogLikelihood(arguments[0], arguments[1])
    if kind == "loglikelihood_rolling":
        return RollingLogLikelihood(arguments[0])
    assert kind == "generate_until", kind
    prompt, settings = arguments
    return generation(prompt, settings)


def generation(prompt: str, settings: Mapping[str, Any]) -> Generate:
    """A request to generate with lm-eval's `generation_kwargs`: greedy unless they say do_sample or a temperature."""
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else until
    limits = [settings[key] for key in TOKEN_LIMITS if settings.get(key) is not None]
    temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
    return Generate(
        prompt,
        tuple(text for text in stop if text),
        max_tokens=int(limits[0]) if limits else MAX_TOKENS,
        temperature=0.0 if settings.get("do_sample") is False else temperature,
        top_p=float(settings.get("top_p") or 1.0),
    )


def _repeats(instance: Any) -> int:
    return int(instance.repeats or 1)


def _response(instance: Any, answer: Answer) -> Any:
    """An answer as lm-eval's filters and metrics take it."""
    if not isinstance(answer, Likelihood):
        return answer
    return answer.logprob if instance.request_type == "loglikelihood_rolling" else (answer.logprob, answer.is_greedy)


def _label(metric: str, filter_name: str) -> str:
    """`acc`, and `exact_match,strict-match` where a filter has a name."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _metric(label: str) -> str:
    return label.partition(",")[0]


def _plain(value: Any) -> Any:
    """A figure as JSON can hold it."""
    if hasattr(value, "tolist"):  # of NumPy
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@cache
def _registry() -> dict[str, Any]:
    """lm-eval's own index, from ours."""
    from lm_eval.tasks import _index

    def entry(name: str, known: Entry) -> Any:
        path = tasks_folder() / known.file if known.file else None
        return _index.Entry(name=name, kind=_index.Kind[known.kind], yaml_path=path, tags=set(known.members))

    return {name: entry(name, known) for name, known in load_index().items()}


def _lm_eval_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
