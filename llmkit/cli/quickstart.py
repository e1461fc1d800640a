"""`llmkit quickstart`: prepare, train, evaluate, sample, report, in one command."""

from __future__ import annotations

import time
from pathlib import Path

import click

from llmkit.cli.ui import emit, json_option, note, progress


@click.command("quickstart")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("quickstart"),
    show_default=True,
    metavar="DIR",
    help="Folder for data, run and report. What is there from an earlier try is used.",
)
@click.option("--backend", metavar="NAME", help="Training backend. [default: torch on a GPU, else llmc]")
@json_option
def command(out: Path, backend: str | None, as_json: bool) -> None:
    """Go through the whole chain once: train a small model on the standard library of this Python, offline."""
    from llmkit.cli.train import default_backend, train_with_progress
    from llmkit.data.prepare import prepare
    from llmkit.plugins import get_plugins
    from llmkit.quickstart import OPTIONS, PROMPTS, VAL_FRACTION, VOCAB_SIZE, Stages, evaluate, finished, samples
    from llmkit.report import write_report
    from llmkit.run import Run
    from llmkit.training import plan

    began = time.monotonic()
    stages = Stages(out)
    name = backend or default_backend()
    trainer = get_plugins().trainer(name)

    note(f"1/4  data: the standard library of this Python, as tokens, in {stages.data}")
    if (stages.data / "meta.json").is_file():
        note("     is there already")
    else:
        with progress("preparing", 1.0) as update:
            prepare(["stdlib"], stages.data, vocab_size=VOCAB_SIZE, val_fraction=VAL_FRACTION, note=note,
                    progress=lambda position, tokens: update(position or 0.0, status=f"{tokens:,} tokens"))  # fmt: skip

    note(f"2/4  training with {name}, in {stages.run}")
    run = Run(stages.run)
    if finished(stages):
        note("     is finished already")
    else:
        resume = run.exists and bool(run.checkpoints)
        options = {} if resume else OPTIONS
        train_with_progress(plan(trainer, options, data=stages.data, out=stages.run, resume=resume))
    validations = [record for record in run.metrics() if record["kind"] == "val"]

    note("3/4  evaluating and sampling")
    results = evaluate(stages.run)
    texts = samples(stages.run, PROMPTS, show=lambda text: note("     " + text.replace("\n", "\n     ") + "\n"))

    note("4/4  report")
    report = write_report(run, stages.report, results=[results])
    outcome = {
        "run": str(stages.run),
        "backend": run.config()["backend"],
        "val_bpb": validations[-1]["bpb"],
        "untrained_bpb": validations[0]["bpb"],
        "results": results["results"],
        "samples": texts,
        "report": str(report),
        "seconds": round(time.monotonic() - began, 1),
    }
    if as_json:
        emit(outcome)
        return
    print(
        f"validation bits per byte: {outcome['val_bpb']:.3f} "
        f"(untrained: {outcome['untrained_bpb']:.3f}; lower is better)\n"
        f"report: {report}\n\n"
        "next:\n"
        f"  llmkit generate {stages.run} --prompt def\n"
        f"  llmkit eval {stages.run} --tasks bpb\n"
        f"  llmkit data prepare YOUR_TEXT --out data\n"
        f"  llmkit train --backend {name} --data data --depth 6\n"
        f"  llmkit plugins new mytask --kind evaluator"
    )
