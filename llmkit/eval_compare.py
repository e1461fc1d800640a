"""Comparison of evaluation results: values side by side, differences with their significance, plots.

Where two results have samples of the same documents, the difference is tested on these pairs; else on the standard
errors of both, which is much coarser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.component import install_hint, missing_modules
from llmkit.eval_results import Figure, Results, in_order, shown
from llmkit.files import write_text
from llmkit.markdown import table

RATIOS = {"bpb": ("bits", "bytes")}  # metrics that are a ratio of two sums over the documents
SIGNIFICANT = 0.05
EXPLANATION = f"""\
p is the chance of a difference at least as large if the two were equally good, for each line by itself: of twenty such
lines one falls below {SIGNIFICANT} by chance. What is below is bold. McNemar's exact test looks at the documents that
only one of the two got right; the paired z at the differences of documents; the two-sample z, where there are no
samples of the same documents, at both standard errors alone."""
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much `other` is above `base` in a metric. `p` is two-sided; None where nothing can be said about it."""

    task: str
    metric: str
    base: str
    other: str
    value: float
    stderr: float | None
    p: float | None
    method: str


def compare(base: Results, other: Results, names: tuple[str, str]) -> list[Difference]:
    """Differences of all metrics that both have; `names` are those of the two."""
    found = []
    for key, figure in base.figures.items():
        if (second := other.figures.get(key)) is not None:
            value, stderr, p, method = _paired(base, other, figure, second) or _unpaired(figure, second)
            found.append(Difference(*key, *names, value, stderr, p, method))
    return found


def _paired(
    base: Results, other: Results, first: Figure, second: Figure
) -> tuple[float, float | None, float | None, str] | None:
    """Difference, standard error, p and method on the documents that both have; None where there are not two."""
    a, b = base.samples.get(first.task, {}), other.samples.get(second.task, {})
    common = sorted(a.keys() & b.keys())
    if len(common) < 2:
        return None
    where = f"{len(common)} documents"
    if ratio := RATIOS.get(first.metric):
        above, below = ratio
        differences = [b[key][above] - a[key][above] for key in common]
        sizes = [a[key][below] for key in common]
        if sizes != [b[key][below] for key in common]:
            return None
        value = math.fsum(differences) / math.fsum(sizes)
        rest = math.fsum((d - value * size) ** 2 for d, size in zip(differences, sizes))
        stderr = math.sqrt(rest * len(common) / (len(common) - 1)) / math.fsum(sizes)
        return value, stderr, _normal(value, stderr), f"paired z (ratio), {where}"
    pairs: list[tuple[Any, Any]] = [(a[key].get(first.score), b[key].get(second.score)) for key in common]
    if not all(isinstance(x, (int, float)) and isinstance(y, (int, float)) for x, y in pairs):
        return None  # a metric that is not made of one number for each document
    differences = [y - x for x, y in pairs]
    value = math.fsum(differences) / len(common)
    variance = math.fsum((d - value) ** 2 for d in differences) / (len(common) - 1)
    stderr = math.sqrt(variance / len(common))
    if all(x in (0, 1) and y in (0, 1) for x, y in pairs):
        return value, stderr, mcnemar(differences.count(1), differences.count(-1)), f"McNemar (exact), {where}"
    return value, stderr, _normal(value, stderr), f"paired z, {where}"


def _unpaired(first: Figure, second: Figure) -> tuple[float, float | None, float | None, str]:
    value = second.value - first.value
    if not first.stderr or not second.stderr:  # too few documents to see any spread
        return value, None, None, "no standard error"
    stderr = math.hypot(first.stderr, second.stderr)
    return value, stderr, _normal(value, stderr), "two-sample z"


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test, for documents that only the one and that only the other got right."""
    n, fewer = won + lost, min(won, lost)
    tail = term = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def _normal(value: float, stderr: float) -> float:
    """Two-sided p of a normal deviate."""
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value / stderr) / math.sqrt(2))


def write_comparison(results: Sequence[Results], out: Path) -> list[Path]:
    """Write `out` (Markdown) and pictures beside it; their paths, the page first.

    Everything is compared with the first of `results`. Without matplotlib the pictures are left out, and the page says
    so. Raises ValueError where the results have no metric in common.
    """
    names = labels(results)
    differences = [
        found for other, name in zip(results[1:], names[1:]) for found in compare(results[0], other, (names[0], name))
    ]
    if len(results) > 1 and not differences:
        raise ValueError(f"{results[0].path} and the others have no metric of a task in common")
    parts = {part for result in results for part in result.parts}
    whole = [key for key in _keys(results) if key[0] not in parts]
    inner = [key for key in _keys(results) if key[0] in parts]
    pictures = _draw(results, names, whole, inner, out)
    sections = [
        "# " + (names[0] if len(results) == 1 else "Comparison of " + ", ".join(names)),
        _sources(results, names),
        "## Results",
        *pictures[:1],
        _values(results, names, whole),
    ]
    if differences:
        sections += [
            f"## Differences from {names[0]}",
            _differences([found for found in differences if found.task not in parts]),
            EXPLANATION,
        ]
    if inner:
        sections += ["## Parts", *pictures[1:], _values(results, names, inner)]
        if differences:
            sections.append(_differences([found for found in differences if found.task in parts]))
    write_text(out, "\n\n".join(sections) + "\n")
    return [out, *(path for path in _picture_paths(out) if path.name in "".join(pictures))]


def section(results: Sequence[Results], out: Path) -> str:
    """Values of results with their picture, as a part of the page `out`."""
    names, keys = labels(results), _keys(results)
    return "\n\n".join([*_draw(results, names, keys, [], out), _sources(results, names), _values(results, names, keys)])


def labels(results: Sequence[Results]) -> list[str]:
    """A short name for each: that of its file, else of its path."""
    names = [result.path.stem for result in results]
    return names if len(set(names)) == len(names) else [str(result.path.with_suffix("")) for result in results]


def _keys(results: Sequence[Results]) -> list[tuple[str, str]]:
    """(task, metric) of all figures; parts below the task that they belong to."""
    found = list(dict.fromkeys(key for result in results for key in result.figures))
    subtasks: dict[str, list[str]] = {}
    for result in results:
        subtasks |= result.subtasks
    parts = {part for members in subtasks.values() for part in members}
    tops = dict.fromkeys(task for task, _ in found if task not in parts)
    order = list(dict.fromkeys(name for top in tops for name in in_order(top, subtasks)))
    order += [task for task, _ in found if task not in order]
    return sorted(found, key=lambda key: order.index(key[0]))


def _sources(results: Sequence[Results], names: Sequence[str]) -> str:
    rows = []
    for result, name in zip(results, names):
        config: Mapping[str, Any] = result.content.get("config", {})
        rows.append([name, result.checkpoint, config.get("engine", ""), config.get("dtype", ""), result.path])
    return table(["", "checkpoint", "engine", "dtype", "file"], rows)


def _values(results: Sequence[Results], names: Sequence[str], keys: Sequence[tuple[str, str]]) -> str:
    rows = []
    for task, metric in keys:
        cells = [result.figures.get((task, metric)) for result in results]
        better = next((cell.better for cell in cells if cell is not None), None)
        arrow = {True: " ↑", False: " ↓", None: ""}[better]
        values = [cell.value for cell in cells if cell is not None]
        best = None if better is None or len(values) < 2 else max(values) if better else min(values)
        sizes = dict.fromkeys(cell.n for cell in cells if cell is not None)
        shots = dict.fromkeys(
            r.content.get("n-shot", {}).get(task, "") for r, c in zip(results, cells) if c is not None
        )
        rows.append(
            [
                task,
                metric + arrow,
                ", ".join(map(str, shots)),
                ", ".join(map(str, sizes)),
                *("-" if c is None else f"**{shown(c)}**" if c.value == best else shown(c) for c in cells),
            ]
        )
    return table(["task", "metric", "shots", "documents", *names], rows, right=range(2, 4 + len(names)))


def _differences(differences: Sequence[Difference]) -> str:
    rows = []
    for found in differences:
        error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
        p = "-" if found.p is None else "< 0.0001" if found.p < 1e-4 else f"{found.p:.4f}"
        p = f"**{p}**" if found.p is not None and found.p < SIGNIFICANT else p
        rows.append([found.other, found.task, found.metric, f"{found.value:+.4f}{error}", p, found.method])
    return table(["", "task", "metric", "difference", "p", "method"], rows, right=(3, 4))


def _picture_paths(out: Path) -> tuple[Path, Path]:
    return out.with_name(f"{out.stem}.png"), out.with_name(f"{out.stem}-parts.png")


def _draw(
    results: Sequence[Results],
    names: Sequence[str],
    whole: Sequence[tuple[str, str]],
    inner: Sequence[tuple[str, str]],
    out: Path,
) -> list[str]:
    """Draw the pictures; what stands for them in the page."""
    if missing := missing_modules(["matplotlib"]):
        return [f"(no pictures: {install_hint(missing)})"]
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = []
    for keys, path in zip((whole, inner), _picture_paths(out)):
        if keys:
            draw(results, names, keys, path)
            shown.append(f"![values with 95% intervals]({path.name})")
    return shown


def draw(results: Sequence[Results], names: Sequence[str], keys: Sequence[tuple[str, str]], path: Path) -> None:
    """A PNG of values with 95% intervals: a panel for each metric, a row for each task, a colour for each result."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas  # without pyplot: no global state, no display

    metrics = list(dict.fromkeys(metric for _, metric in keys))
    rows = {metric: [task for task, found in keys if found == metric] for metric in metrics}
    step = (0.18 if len(keys) < 15 else 0.1) * max(len(results), 2)  # inches for a task
    heights = [step * len(rows[metric]) + 0.5 for metric in metrics]
    canvas = Canvas(figsize=(8, sum(heights) + 0.3 * len(metrics) + 0.3), layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(len(metrics), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, metric in zip(panels, metrics):
        tasks = rows[metric]
        for number, (result, name) in enumerate(zip(results, names)):
            shift = 0.6 * ((number + 0.5) / len(results) - 0.5)
            found = [
                (row, result.figures[task, metric])
                for row, task in enumerate(tasks)
                if (task, metric) in result.figures
            ]
            panel.errorbar(
                [figure.value for _, figure in found],
                [row + shift for row, _ in found],
                xerr=[1.96 * (figure.stderr or 0.0) for _, figure in found],
                fmt="o",
                markersize=4,
                linewidth=1.2,
                color=COLOURS[number % len(COLOURS)],
                label=name,
            )
        panel.set_yticks(range(len(tasks)), tasks, fontsize=8)
        panel.set_ylim(len(tasks) - 0.4, -0.6)
        panel.set_title(metric, fontsize=9, loc="left")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if len(results) > 1:
        handles, texts = panels[0].get_legend_handles_labels()
        canvas.legend(handles, texts, loc="outside upper right", ncols=min(len(results), 4), frameon=False, fontsize=8)
    canvas.savefig(path, dpi=120)
