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
from llmkit.cli.sampling import endpoint_flags, engine_flags

if TYPE_CHECKING:
    from llmkit.engine import Engine
    from llmkit.eval_cache import AnswerCache
    from llmkit.evaluation import Evaluation

STATUS_SECONDS = 1.0  # how often the running metric is worked out anew, which takes time with many documents


@click.command("eval")
@click.argument("checkpoint", required=False)
@click.option("--tasks", metavar="A,B", help="Tasks, separated by commas; `list` shows them.")
@click.option("--list", "list_tasks", is_flag=True, help="Show the tasks that are installed.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="First N documents of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="K", help="Examples in front of each question.")
@click.option("--apply-chat-template", is_flag=True, help="Ask in the chat format of the model.")
@click.option("--system-prompt", metavar="TEXT", help="First message to a chat model.")
@click.option("--fewshot-as-turns", is_flag=True, help="Examples as questions and answers of a chat.")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Local data of the tasks.")
@click.option(
    "--task-data",
    multiple=True,
    metavar="TASK=SPLIT:FILE",
    help="Local file for a split of a task; may be repeated.",
)
@click.option("--data", metavar="PATH", help="Text file, data folder or named source for `bpb`.")
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Answers to a problem of `humaneval`, for pass@k."
)
@click.option("--temperature", type=click.FloatRange(min=0.01), metavar="T", help="Of several samples.  [default: 0.8]")
@click.option("--unsafe-execute", is_flag=True, help="Run generated code even where no sandbox works.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write results here as JSON; Markdown and samples beside it.",
)
@click.option("--no-cache", is_flag=True, help="Ask everything anew, and keep no answers.")
@engine_flags
@endpoint_flags
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
    apply_chat_template: bool,
    system_prompt: str | None,
    fewshot_as_turns: bool,
    data_dir: Path | None,
    task_data: tuple[str, ...],
    data: str | None,
    samples: int | None,
    temperature: float | None,
    unsafe_execute: bool,
    out: Path | None,
    no_cache: bool,
    dtype: str | None,
    quantize: str | None,
    device: str | None,
    engine_url: str | None,
    engine_model: str | None,
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
    if out is not None and out.suffix == ".md":
        raise click.UsageError(f"--out is for JSON, and Markdown comes beside it: name it {out.with_suffix('.json')}")
    files = _task_files(task_data)
    if not apply_chat_template and (system_prompt is not None or fewshot_as_turns):
        flag = "--fewshot-as-turns" if system_prompt is None else "--system-prompt"
        raise click.UsageError(f"{flag} needs --apply-chat-template")

    from llmkit.checkpoint import Checkpoint
    from llmkit.engines import open_engine
    from llmkit.eval_cache import open_cache
    from llmkit.eval_chat import Chat
    from llmkit.eval_results import samples_path, write_results
    from llmkit.evaluation import Evaluation

    options = {
        "data": data,
        "samples": samples,
        "temperature": temperature,
        "unsafe_execute": "yes" if unsafe_execute else None,
    }
    model = Checkpoint.open(checkpoint)
    evaluation = Evaluation(
        model,
        names,
        limit=limit,
        num_fewshot=num_fewshot,
        data_dir=data_dir,
        seed=seed,
        options={name: str(value) for name, value in options.items() if value is not None},
        chat=Chat(model, system_prompt or "", fewshot_as_turns) if apply_chat_template else None,
        task_data=files,
    )
    with (
        _samples_file(out) as file,
        open_engine(
            model, engine, dtype=dtype, device=device, quantize=quantize, url=engine_url, model=engine_model
        ) as opened,
        contextlib.ExitStack() as stack,
    ):
        cache = None if no_cache else open_cache(model, opened, {"device": device, "quantize": quantize})
        if cache is not None:
            stack.callback(cache.close)
        try:
            _run(evaluation, opened, file, cache)
        except KeyboardInterrupt:
            if cache is not None:
                ui.note("the answers so far are kept: the same command goes on from here")
            raise
    results = evaluation.results()
    if out is not None:
        written = write_results(out, results, evaluation.lm_eval_names)
        ui.note(f"results: {', '.join(map(str, written))}, samples: {samples_path(out)}")
    for name, missing in results["missing"].items():
        ui.note(f"{name} is partial, without {', '.join(missing)}: {next(iter(missing.values()))}")
    for name, count in evaluation.truncated.items():
        if count:
            ui.note(f"{name}: {count} documents were longer than the model's context and lost their beginning")
    if evaluation.cached:
        ui.note(f"{evaluation.cached} answers were there from an earlier run (--no-cache asks anew)")
    if as_json:
        ui.emit(results)
    else:
        _show_results(results)


def _task_files(given: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """`--task-data` as task -> split -> file. Raises click.UsageError for one that is not TASK=SPLIT:FILE."""
    files: dict[str, dict[str, Path]] = {}
    for text in given:
        task, _, place = text.partition("=")
        split, _, file = place.partition(":")
        if not (task and split and file):
            raise click.UsageError(f"--task-data is TASK=SPLIT:FILE, not {text!r}")
        if not Path(file).is_file():
            raise click.UsageError(f"--task-data {text}: there is no file {file}")
        files.setdefault(task, {})[split] = Path(file)
    return files


@contextlib.contextmanager
def _samples_file(out: Path | None) -> Iterator[IO[str] | None]:
    """The file of samples, opened before the model is loaded, so that a place that cannot be written shows at once.

    What an earlier run left in it stays until there is a first sample to write.
    """
    if out is None:
        yield None
        return
    from llmkit.eval_results import samples_path

    out.parent.mkdir(parents=True, exist_ok=True)
    file = samples_path(out).open("a", encoding="utf-8")
    try:
        yield file
    finally:  # each line was flushed; on a full disk closing only fails once more
        with contextlib.suppress(OSError):
            file.close()


def _run(evaluation: Evaluation, engine: Engine, samples: IO[str] | None, cache: AnswerCache | None) -> None:
    """Run to the end, drawing progress and writing each sample as it comes."""
    shown = time.monotonic()
    with ui.progress("evaluating", evaluation.total) as update:
        for number, sample in enumerate(evaluation.run(engine, cache)):
            if samples is not None:
                if number == 0 and samples.tell():
                    samples.truncate(0)
                try:
                    samples.write(json.dumps(sample.to_json(), ensure_ascii=False, default=str) + "\n")
                    samples.flush()
                except OSError as error:
                    kept = "" if cache is None else " (the answers so far are kept: the same command goes on from here)"
                    raise OSError(error.errno, f"{error.strerror}{kept}", samples.name) from error
            status = ""
            if time.monotonic() - shown > STATUS_SECONDS:
                figures = evaluation.running(sample.task).items()
                status = f"{sample.task} " + " ".join(f"{name} {value:.3f}" for name, value in figures)
                shown = time.monotonic()
            update(advance=1, status=status)


def _show_tasks(as_json: bool) -> None:
    from llmkit.plugins import get_plugins

    tasks, families = get_plugins().all("evaluator"), get_plugins().all("task family")
    if as_json:
        listed = [{"name": t.name, "version": t.version, "summary": t.summary()} for t in tasks]
        ui.emit({"tasks": listed, "families": [{"name": f.name, "summary": f.summary()} for f in families]})
    else:
        rows = [[t.name, t.version, t.summary()] for t in tasks]
        ui.table(["task", "version", "what it asks"], rows + [[f"{f.name}:NAME", "", f.summary()] for f in families])


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
