"""`llmkit report`: Markdown and pictures of a training run, or of results of evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmkit.cli.ui import emit, json_option

if TYPE_CHECKING:
    from llmkit.eval_results import Results


@click.command("report")
@click.argument("places", metavar="[RUN | RESULTS...]", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="[default: report.md in RUN, or beside the first RESULTS]",
)
@json_option
def command(places: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write a report of RUN (by default the latest): configuration, loss curve, samples, evaluations.

    Or compare RESULTS of evaluations, written by llmkit eval --out, with the first of them: values side by side,
    differences with their significance, plots. A run among them stands for the results in its folder evals.
    """
    from llmkit.checkpoint import latest_run
    from llmkit.eval_compare import compare, labels, write_comparison
    from llmkit.report import REPORT, write_report
    from llmkit.run import Run

    if len(places) < 2 and not (places and places[0].is_file()):
        chosen = places[0] if places else latest_run()
        if chosen is None:
            raise click.UsageError("name a run: none has been trained yet")
        if not chosen.is_dir():
            raise ValueError(f"there is no run {chosen}")
        path = write_report(Run(chosen), out)
        if as_json:
            emit({"run": str(chosen), "report": str(path)})
        else:
            print(path)
        return
    results = [found for place in places for found in _read(place)]
    written = write_comparison(results, out or results[0].path.with_name(REPORT))
    if as_json:
        names = labels(results)
        differences = [
            {name: getattr(found, name) for name in found.__slots__}
            for other, name in zip(results[1:], names[1:])
            for found in compare(results[0], other, (names[0], name))
        ]
        emit({"report": str(written[0]), "pictures": [str(path) for path in written[1:]], "differences": differences})
    else:
        print(written[0])


def _read(place: Path) -> list[Results]:
    """The results that an argument names. Raises ValueError where there are none."""
    from llmkit.eval_results import Results, results_of_run

    if not place.is_dir():
        return [Results.read(place)]
    if found := results_of_run(place):
        return found
    raise ValueError(f"{place} has no results to compare: write some with llmkit eval --out {place}/evals/NAME.json")
