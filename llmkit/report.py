"""Report: what a training run was and came to, as Markdown with a picture of its loss."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.checkpoint import Checkpoint
from llmkit.component import install_hint, missing_modules
from llmkit.eval_compare import section
from llmkit.eval_results import results_of_run
from llmkit.files import write_text
from llmkit.markdown import table
from llmkit.run import Run

PICTURE = "loss.png"
REPORT = "report.md"


def write_report(run: Run, out: Path | None = None, *, results: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write report.md, and the picture beside it, into the run (or `out`, a Markdown file); returns its path.

    `results` are results of an evaluation to show, besides those in the run's folder `evals`. Raises ValueError where
    there is no run, or it has no metrics yet. Without matplotlib the picture is left out, and the report says so.
    """
    config = run.config()
    metrics = run.metrics()
    if not metrics:
        raise ValueError(f"{run.path} has no metrics yet: nothing to report")
    path = out or run.path / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    if missing := missing_modules(["matplotlib"]):
        picture = f"(no picture of the loss: {install_hint(missing)})"
    else:
        draw_loss(metrics, path.with_name(PICTURE))
        picture = f"![training and validation loss]({PICTURE})"
    sections = [
        f"# {run.path.resolve().name}",
        _summary(run, config, metrics),
        f"## Loss\n\n{picture}\n\n{_validations(metrics)}",
    ]
    if evaluated := [record for record in metrics if record["kind"] == "eval"]:
        sections.append("## Evaluations during training\n\n" + _evaluations(evaluated))
    if results:
        sections.append("## Evaluation\n\n" + _results(results))
    if found := results_of_run(run.path):
        sections.append("## Evaluations\n\n" + section(found, path.with_name("evals.md")))
    if samples := [record for record in metrics if record["kind"] == "sample"]:
        sections.append("## Samples\n\n" + "\n\n".join(_quote(record) for record in samples[-3:]))
    sections.append("## Configuration\n\n" + table(["option", "value"], sorted(config["config"].items())))
    write_text(path, "\n\n".join(sections) + "\n")
    return path


def draw_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG of training loss (each step and smoothed) and validation loss over tokens, learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    steps = [record for record in metrics if record["kind"] == "step"]
    tokens_after = {record["step"] + 1: record["tokens"] for record in steps}
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    xs = [record["tokens"] for record in steps]
    losses = [record["loss"] for record in steps]
    loss.plot(xs, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    loss.plot(xs, smooth(losses), color="tab:blue", label="training (smoothed)")
    validations = [
        (tokens_after.get(record["step"], 0), record["loss"]) for record in metrics if record["kind"] == "val"
    ]
    if validations:
        loss.plot(*zip(*validations), color="tab:orange", marker="o", markersize=3, label="validation")
    loss.set_ylabel("loss (nats per token)")
    loss.grid(alpha=0.3)
    loss.legend(frameon=False)
    rate.plot(xs, [record["learning_rate"] for record in steps], color="tab:gray")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens")
    rate.grid(alpha=0.3)
    rate.ticklabel_format(axis="both", style="sci", scilimits=(-2, 4))
    figure.savefig(path, dpi=120)


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam's moments are)."""
    average, result = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def _summary(run: Run, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = [record for record in metrics if record["kind"] == "step"]
    validations = [record for record in metrics if record["kind"] == "val"]
    c = config["config"]
    rows = [
        ("backend", config["backend"]),
        (
            "model",
            f"depth {c['depth']}, width {c['width']}, {c['heads']} heads, sequence length {c['sequence_length']}",
        ),
        ("data", f"{config['data']['path']} ({config['data']['fingerprint'][:12]})"),
    ]
    if steps:
        seconds = sum(record["seconds"] for record in steps)
        trained = sum(c["total_batch_tokens"] for _ in steps)
        rows += [
            ("steps", f"{steps[-1]['step'] + 1} of {c['steps']}"),
            ("tokens", f"{steps[-1]['tokens']:,}"),
            ("time in steps", f"{seconds:.0f} s, {trained / seconds:,.0f} tokens/s" if seconds else "-"),
            ("training loss", f"{smooth([record['loss'] for record in steps])[-1]:.4f} (smoothed)"),
        ]
    if validations:
        first, last = validations[0], validations[-1]
        rows.append(("validation loss", f"{last['loss']:.4f}"))
        before = f" (untrained: {first['bpb']:.4f})" if first["step"] == 0 else ""
        rows.append(("validation bits per byte", f"{last['bpb']:.4f}{before}"))
    if run.checkpoints:
        checkpoint = Checkpoint.open(run.path)
        rows.append(("newest checkpoint", str(checkpoint.path)))
    rows.append(("began", config.get("began", "-")))
    rows.append(("reported", time.strftime("%Y-%m-%dT%H:%M:%S%z")))
    return table(["", ""], rows)


def _validations(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (record["step"], f"{record['loss']:.4f}", f"{record['bpb']:.4f}")
        for record in metrics
        if record["kind"] == "val"
    ]
    return table(["after step", "validation loss", "bits per byte"], rows) if rows else "(not validated)"


def _evaluations(records: Sequence[Mapping[str, Any]]) -> str:
    names = ("step", "task", "metric", "value", "n")
    rows = [tuple(f"{r[name]:.4f}" if name == "value" else r[name] for name in names) for r in records]
    return table(["after step", "task", "metric", "value", "documents"], rows)


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        for task, figures in result["results"].items():
            for name, value in figures.items():
                if name != "n" and not name.endswith("_stderr") and isinstance(value, (int, float)):
                    error = figures.get(f"{name}_stderr")
                    shown = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
                    rows.append((task, name, shown, figures.get("n", "")))
    return table(["task", "metric", "value", "documents"], rows)


def _quote(record: Mapping[str, Any]) -> str:
    """A sample as an indented block, which shows any text as it is."""
    text = "\n".join("    " + line for line in record["text"].splitlines()) or "    (nothing)"
    return f"After step {record['step']}:\n\n{text}"
