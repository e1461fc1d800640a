"""`llmkit report`: Markdown and a picture for a training run."""

from __future__ import annotations

from pathlib import Path

import click

from llmkit.cli.ui import emit, json_option


@click.command("report")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="[default: RUN/report.md]")
@json_option
def command(run: Path | None, out: Path | None, as_json: bool) -> None:
    """Write a report of RUN (by default the latest): configuration, loss curve, samples."""
    from llmkit.checkpoint import latest_run
    from llmkit.report import write_report
    from llmkit.run import Run

    chosen = run or latest_run()
    if chosen is None:
        raise click.UsageError("name a run: none has been trained yet")
    if not chosen.is_dir():
        raise ValueError(f"there is no run {chosen}")
    path = write_report(Run(chosen), out)
    if as_json:
        emit({"run": str(chosen), "report": str(path)})
    else:
        print(path)
