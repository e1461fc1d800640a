"""Results of evaluations as files: JSON in lm-eval's schema, Markdown, and samples, one JSON object a line.

lm-eval names a metric `acc,none`: its own name and that of the filter that its answers went through.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.files import write_json, write_text
from llmkit.markdown import table

Names = Mapping[str, Mapping[str, str]]  # task -> metric -> lm-eval's name, where that is not `metric,none`


def write_results(out: Path, results: Mapping[str, Any], names: Names) -> list[Path]:
    """Write `out` and its Markdown beside it; their paths. `results` are those of `Evaluation.results()`."""
    content = to_lm_eval(results, names)
    write_json(out, content)
    pages = out.with_suffix(".md")
    write_text(pages, markdown(content))
    return [out, pages]


def results_of_run(run: Path) -> list[Results]:
    """The results in the folder `evals` of a training run."""
    return [Results.read(path) for path in sorted((run / "evals").glob("*.json"))]


def samples_path(out: Path) -> Path:
    """`results.json` -> `results.samples.jsonl`."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def to_lm_eval(results: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Results in the schema of lm-eval's results file, which its own tools read."""
    tables: dict[str, dict[str, Any]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for task, figures in results["results"].items():
        better = results["higher_is_better"][task]
        row: dict[str, Any] = {"alias": task, "sample_len": figures["n"]}
        metrics = []
        for metric in (name for name in figures if name != "n" and not name.endswith("_stderr")):
            full = names.get(task, {}).get(metric) or (metric if "," in metric else f"{metric},none")
            kind, _, filtered = full.partition(",")
            row[full] = figures[metric]
            row[f"{kind}_stderr,{filtered}"] = figures.get(f"{metric}_stderr", "N/A")
            metrics.append(
                {"metric": kind, "filter": filtered, "higher_is_better": better.get(metric), "score": metric}
            )
        tables[task] = row
        configs[task] = {
            "task": task,
            "num_fewshot": results["n-shot"].get(task),
            "metric_list": metrics,
            "metadata": {"version": results["versions"][task]},
        }
    subtasks: dict[str, list[str]] = results["group_subtasks"]
    config = results["config"]
    return {
        "results": tables,
        "groups": {name: tables[name] for name in subtasks if name in tables},
        "group_subtasks": {**{name: [] for name in tables}, **subtasks},
        "configs": configs,
        "versions": results["versions"],
        "n-shot": results["n-shot"],
        "higher_is_better": {
            task: {entry["metric"]: entry["higher_is_better"] for entry in configs[task]["metric_list"]}
            for task in tables
        },
        "n-samples": results["n-samples"],
        "config": config,
        "model_name": config["checkpoint"],
        "system_instruction": config["system_prompt"],
        "fewshot_as_multiturn": config["fewshot_as_turns"],
        "missing": results["missing"],
        "truncated": results["truncated"],
        "cached": results["cached"],
        "date": time.time(),
        "total_evaluation_time_seconds": str(results["seconds"]),
    }


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric of a task. `score` is its name in the samples; `better`: is higher better, where that is known."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    better: bool | None
    score: str


@dataclass(frozen=True)
class Results:
    """A file of results, ours or lm-eval's.

    Attributes:
        figures: (task, metric) -> figure; a metric is shown with its filter where it has one.
        subtasks: task -> its parts.
    """

    path: Path
    content: Mapping[str, Any]
    figures: Mapping[tuple[str, str], Figure]
    subtasks: Mapping[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises ValueError, naming the file, where it holds no results."""
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error})") from None
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            raise ValueError(f"{path} holds no results of an evaluation (write some with llmkit eval --out)")
        figures = {(figure.task, figure.metric): figure for figure in _figures(content)}
        subtasks = {name: parts for name, parts in content.get("group_subtasks", {}).items() if parts}
        return cls(path, content, figures, subtasks)

    @property
    def checkpoint(self) -> str:
        return str(self.content.get("model_name") or self.content.get("config", {}).get("checkpoint") or self.path.stem)

    @property
    def parts(self) -> set[str]:
        """Tasks that are parts of others."""
        return {part for parts in self.subtasks.values() for part in parts}

    @cached_property
    def samples(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Task, or part of one -> document -> its scores; empty where the samples are not beside the results.

        A document goes by its number and content. A line that was torn ends the reading.
        """
        found: dict[str, dict[str, Mapping[str, Any]]] = {}
        path = samples_path(self.path)
        if not path.is_file():
            return found
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    sample = json.loads(line)
                except ValueError:
                    break
                content = json.dumps(sample["doc"], sort_keys=True).encode()
                document = f"{sample['doc_id']} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
                for task in (sample["task"], *sample.get("parts", ())):
                    found.setdefault(task, {})[document] = sample["scores"]
        return found


def _figures(content: Mapping[str, Any]) -> Iterator[Figure]:
    for task, row in content["results"].items():
        known = {
            f"{entry['metric']},{entry.get('filter', 'none')}": entry
            for entry in content.get("configs", {}).get(task, {}).get("metric_list", ())
            if isinstance(entry, dict) and "metric" in entry
        }
        sizes = content.get("n-samples", {}).get(task, {})
        for name, value in row.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = row.get(f"{metric}_stderr,{filtered}")
            yield Figure(
                task,
                metric if filtered == "none" else name,
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
                row.get("sample_len", sizes.get("effective")),
                content.get("higher_is_better", {}).get(task, {}).get(metric),
                known.get(name, {}).get("score", metric),
            )


def markdown(content: Mapping[str, Any]) -> str:
    """Results as a page: all tasks, then the parts of each that has some."""
    results = Results(Path("results.json"), content, {(f.task, f.metric): f for f in _figures(content)}, {})
    subtasks = {name: parts for name, parts in content["group_subtasks"].items() if parts}
    parts = {part for found in subtasks.values() for part in found}
    figures = list(results.figures.values())
    config = content["config"]
    about = [(name, "" if value is None else value) for name, value in config.items()]
    sections = [
        f"# Evaluation of {Path(config['checkpoint']).name}",
        _page_table(content, [figure for figure in figures if figure.task not in parts]),
    ]
    for name in subtasks:
        if name not in parts:
            inner = [figure for task in in_order(name, subtasks)[1:] for figure in figures if figure.task == task]
            sections += [f"## {name}", _page_table(content, inner, subtasks)]
    notes = [f"{task}: {count} documents were cut to fit." for task, count in content["truncated"].items() if count]
    notes += [f"{task}: partial, without {', '.join(missing)}." for task, missing in content["missing"].items()]
    if notes:
        sections.append("\n".join(f"- {note}" for note in notes))
    sections += ["## Configuration", table(["", ""], about)]
    return "\n\n".join(sections) + "\n"


def in_order(task: str, subtasks: Mapping[str, list[str]]) -> list[str]:
    """A task, and its parts below it."""
    return [task, *(name for part in subtasks.get(task, ()) for name in in_order(part, subtasks))]


def _page_table(content: Mapping[str, Any], figures: list[Figure], groups: Mapping[str, Any] | None = None) -> str:
    rows = []
    for figure in figures:
        name = f"**{figure.task}**" if groups and figure.task in groups else figure.task
        arrow = {True: "↑", False: "↓", None: ""}[figure.better]
        rows.append(
            [
                name,
                content["versions"].get(figure.task, ""),
                content["n-shot"].get(figure.task, ""),
                figure.n,
                f"{figure.metric} {arrow}",
                shown(figure),
            ]
        )
    return table(["task", "version", "shots", "documents", "metric", "value"], rows, right=(2, 3, 5))


def shown(figure: Figure) -> str:
    """`0.3950 ± 0.0346`."""
    return f"{figure.value:.4f}" + ("" if figure.stderr is None else f" ± {figure.stderr:.4f}")
