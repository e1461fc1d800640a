"""`llmkit eval`: evaluates a checkpoint on tasks, prints a table or JSON, and writes results and samples to files."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from llmkit.cli import ui

if TYPE_CHECKING:
    from llmkit.engine import Engine
    from llmkit.evaluation import Evaluation

STATUS_SECONDS = 1.0  # how often the running metric is worked out anew, which takes time with many documents


@click.command("eval")
@click.argument("checkpoint", required=False)
@click.option("--tasks", metavar="A,B", help="Tasks, separated by commas; `list` shows them.")
@click.option("--list", "list_tasks", is_flag=True, help="Show the tasks that are installed.")
@click.option("--engine", metavar="NAME", help="[default: the one for the model's architecture]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="First N documents of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="K", help="Examples in front of each question.")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Local data of the tasks.")
@click.option("--data", metavar="PATH", help="Text file, data folder or named source for `bpb`.")
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Answers to a problem of `humaneval`, for pass@k."
)
@click.option("--temperature", type=click.FloatRange(min=0.01), metavar="T", help="Of several samples.  [default: 0.8]")
@click.option("--unsafe-execute", is_flag=True, help="Run generated code even where no sandbox works.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write results here, samples beside it.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="[default: the checkpoint's]")
@click.option("--quantize", type=click.Choice(["int8"]), help="Round the weights to this type when they are loaded.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps  [default: the best there is]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1234,
    show_default=True,
    metavar="N",
    help="Of few-shot draws and sampled answers.",
)
@ui.json_option
def command(
    checkpoint: str | None,
    tasks: str | None,
    list_tasks: bool,
    engine: str | None,
    limit: int | None,
    num_fewshot: int | None,
    data_dir: Path | None,
    data: str | None,
    samples: int | None,
    temperature: float | None,
    unsafe_execute: bool,
    out: Path | None,
    dtype: str | None,
    quantize: str | None,
    device: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Evaluate CHECKPOINT, by default the newest of the latest training run, on tasks."""
    from llmkit.plugins import get_plugins

    if list_tasks or tasks == "list":
        _show_tasks(as_json)
        return
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names:
        raise click.UsageError("name the tasks with --tasks; `llmkit eval --list` shows them")
    for name in names:
        get_plugins().evaluator(name)
    if engine is not None:
        get_plugins().engine(engine)  # a wrong name shows before anything is loaded
    if data_dir is not None and not data_dir.is_dir():
        raise ValueError(f"there is no folder {data_dir}")

    from llmkit.checkpoint import Checkpoint
    from llmkit.engines import open_engine
    from llmkit.evaluation import Evaluation
    from llmkit.files import write_json

    options = {
        "data": data,
        "samples": samples,
        "temperature": temperature,
        "unsafe_execute": "yes" if unsafe_execute else None,
    }
    evaluation = Evaluation(
        Checkpoint.open(checkpoint),
        names,
        limit=limit,
        num_fewshot=num_fewshot,
        data_dir=data_dir,
        seed=seed,
        options={name: str(value) for name, value in options.items() if value is not None},
    )
    with (
        _samples_file(out) as file,
        open_engine(evaluation.checkpoint, engine, dtype=dtype, device=device, quantize=quantize) as opened,
    ):
        _run(evaluation, opened, file)
    results = evaluation.results()
    if out is not None:
        write_json(out, results)
        ui.note(f"results: {out}, samples: {samples_path(out)}")
    for name, missing in results["missing"].items():
        for member, reason in missing.items():
            ui.note(f"{name} is partial: {member} is missing, {reason}")
    for name, count in evaluation.truncated.items():
        if count:
            ui.note(f"{name}: {count} documents were longer than the model's context and lost their beginning")
    if as_json:
        ui.emit(results)
    else:
        _show_results(results)


def samples_path(out: Path) -> Path:
    """`results.json` -> `results.samples.jsonl`."""
    return out.with_name(f"{out.stem}.samples.jsonl")


@contextlib.contextmanager
def _samples_file(out: Path | None) -> Iterator[IO[str] | None]:
    """The file of samples, opened before the model is loaded, so that a place that cannot be written shows at once."""
    if out is None:
        yield None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with samples_path(out).open("w", encoding="utf-8") as file:
        yield file


def _run(evaluation: Evaluation, engine: Engine, samples: IO[str] | None) -> None:
    """Run to the end, drawing progress and writing each sample as it comes."""
    shown = time.monotonic()
    with ui.progress("evaluating", evaluation.total) as update:
        for sample in evaluation.run(engine):
            if samples is not None:
                samples.write(json.dumps(sample.to_json(), ensure_ascii=False, default=str) + "\n")
                samples.flush()
            status = ""
            if time.monotonic() - shown > STATUS_SECONDS:
                figures = evaluation.running(sample.task).items()
                status = f"{sample.task} " + " ".join(f"{name} {value:.3f}" for name, value in figures)
                shown = time.monotonic()
            update(advance=1, status=status)


def _show_tasks(as_json: bool) -> None:
    from llmkit.plugins import get_plugins

    tasks = get_plugins().all("evaluator")
    if as_json:
        ui.emit({"tasks": [{"name": t.name, "version": t.version, "summary": t.summary()} for t in tasks]})
    else:
        ui.table(["task", "version", "what it asks"], [[t.name, t.version, t.summary()] for t in tasks])


def _show_results(results: dict[str, Any]) -> None:
    rows = []
    for task, figures in results["results"].items():
        for name, value in figures.items():
            if name == "n" or name.endswith("_stderr"):
                continue
            better = {True: "higher", False: "lower", None: ""}[results["higher_is_better"][task].get(name)]
            stderr = figures.get(f"{name}_stderr")
            plus_minus = "" if stderr is None else f"± {stderr:.4f}"
            shots, n = str(results["n-shot"].get(task, "")), str(figures["n"])
            rows.append([task, results["versions"][task], shots, n, name, better, f"{value:.4f}", plus_minus])
    columns = ["task", "version", "shots", "n", "metric", "better", "value", "stderr"]
    ui.table(columns, rows, right=(2, 3, 6))
