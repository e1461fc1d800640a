"""Results as files: lm-eval's schema, Markdown, comparisons whose tests say what they should, pictures."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.cli.main import run
from llmkit.eval_compare import compare, mcnemar
from llmkit.eval_results import Results, samples_path, to_lm_eval, write_results

Scores = Sequence[Mapping[str, float]]


def results(
    tasks: Mapping[str, Mapping[str, float]], subtasks: Mapping[str, list[str]] | None = None
) -> dict[str, Any]:
    """What an Evaluation gives for these figures."""
    config = {
        "checkpoint": "models/one",
        "system_prompt": None,
        "fewshot_as_turns": False,
        "engine": "e",
        "dtype": "fp32",
    }
    metrics = {name: [m for m in row if m != "n" and not m.endswith("_stderr")] for name, row in tasks.items()}
    return {
        "results": tasks,
        "versions": dict.fromkeys(tasks, "1.0"),
        "n-shot": dict.fromkeys(tasks, 5),
        "higher_is_better": {name: dict.fromkeys(found, True) for name, found in metrics.items()},
        "n-samples": {name: {"original": 100, "effective": row["n"]} for name, row in tasks.items()},
        "group_subtasks": subtasks or {},
        "missing": {},
        "truncated": dict.fromkeys(tasks, 0),
        "cached": 0,
        "config": config,
        "seconds": 1.5,
    }


def mean_row(values: Sequence[float]) -> dict[str, float]:
    average = math.fsum(values) / len(values)
    variance = math.fsum((v - average) ** 2 for v in values) / (len(values) - 1)
    return {"acc": average, "acc_stderr": math.sqrt(variance / len(values)), "n": len(values)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes results of a task from the scores of its documents, and samples unless told not to."""

    def write(name: str, scores: Scores, *, samples: bool = True, row: Mapping[str, float] | None = None) -> Path:
        out = tmp_path / f"{name}.json"
        row = row or mean_row([score["acc"] for score in scores])
        write_results(out, results({"quiz": row}), {"quiz": {"exact": "exact_match,strict-match"}})
        if samples:
            lines = [{"task": "quiz", "doc_id": i, "doc": {"q": i}, "scores": s} for i, s in enumerate(scores)]
            samples_path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return out

    return write


def test_the_file_has_the_harness_s_schema() -> None:
    rows = {
        "sums": {"exact": 0.5, "exact_stderr": 0.1, "loose,flexible": 0.75, "n": 8},
        "law": {"acc": 0.25, "n": 1},
        "exams": {"acc": 0.25, "n": 1},
    }
    content = to_lm_eval(results(rows, {"exams": ["law"]}), {"sums": {"exact": "exact_match,strict-match"}})
    sums = content["results"]["sums"]
    assert sums["exact_match,strict-match"] == 0.5 and sums["exact_match_stderr,strict-match"] == 0.1
    assert sums["loose,flexible"] == 0.75 and sums["loose_stderr,flexible"] == "N/A"
    assert content["results"]["law"] == {"alias": "law", "sample_len": 1, "acc,none": 0.25, "acc_stderr,none": "N/A"}
    assert content["group_subtasks"] == {"sums": [], "law": [], "exams": ["law"]}
    assert list(content["groups"]) == ["exams"]
    assert content["higher_is_better"]["sums"] == {"exact_match": True, "loose": True}
    assert content["n-samples"]["sums"] == {"original": 100, "effective": 8}


def test_the_harness_s_own_table_reads_it() -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    rows = {"exams": {"acc": 0.25, "acc_stderr": 0.02, "n": 9}, "law": {"acc": 0.25, "acc_stderr": 0.03, "n": 9}}
    made = utils.make_table(to_lm_eval(results(rows, {"exams": ["law"]}), {}))
    assert "|exams" in made and "- law" in made and "0.03|" in made


def test_what_was_written_is_read_back(write: Callable[..., Path]) -> None:
    path = write("a", [], samples=False, row={"exact": 0.5, "exact_stderr": 0.1, "n": 4})
    figure = Results.read(path).figures["quiz", "exact_match,strict-match"]
    assert (figure.value, figure.stderr, figure.n, figure.better, figure.score) == (0.5, 0.1, 4, True, "exact")
    page = path.with_suffix(".md").read_text()
    assert "| quiz | 1.0 | 5 | 4 | exact_match,strict-match ↑ | 0.5000 ± 0.1000 |" in page


@pytest.mark.parametrize(
    ("won", "lost", "p"), [(0, 0, 1), (0, 5, 2 / 32), (5, 0, 2 / 32), (5, 5, 1), (1, 9, 22 / 1024), (9, 1, 22 / 1024)]
)
def test_mcnemar_s_exact_test(won: int, lost: int, p: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(p)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(won: int, lost: int) -> None:
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    assert mcnemar(won, lost) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_many_documents() -> None:
    z = 200 / math.sqrt(7000)
    assert mcnemar(3600, 3400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_same_documents_are_paired(write: Callable[..., Path]) -> None:
    """Ten of a hundred documents are gained and none lost: pairs tell, the standard errors alone do not."""
    a = [{"acc": float(i % 2)} for i in range(100)]
    b = [{"acc": 1.0 if i < 20 else float(i % 2)} for i in range(100)]
    paths = write("a", a), write("b", b), write("c", b, samples=False)
    first, second, bare = map(Results.read, paths)
    (paired,) = compare(first, second, ("a", "b"))
    assert paired.method == "McNemar (exact), 100 documents" and paired.value == pytest.approx(0.1)
    assert paired.p == pytest.approx(2 / 2**10)
    assert paired.stderr == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    (unpaired,) = compare(first, bare, ("a", "c"))
    assert unpaired.method == "two-sample z" and unpaired.p is not None and unpaired.p > 0.1


def test_other_documents_are_not_paired(write: Callable[..., Path]) -> None:
    a = write("a", [{"acc": 0.0}, {"acc": 1.0}, {"acc": 1.0}])
    b = write("b", [{"acc": 0.0}, {"acc": 1.0}, {"acc": 1.0}])
    samples_path(b).write_text(samples_path(b).read_text().replace('"q": ', '"question": '))
    assert compare(Results.read(a), Results.read(b), ("a", "b"))[0].method == "two-sample z"


def test_only_common_documents_are_paired(write: Callable[..., Path]) -> None:
    a = write("a", [{"acc": 1.0}] * 4 + [{"acc": 0.0}])
    b = write("b", [{"acc": 1.0}] * 3 + [{"acc": 0.0}])
    found = compare(Results.read(a), Results.read(b), ("a", "b"))[0]
    assert (found.value, found.method) == (-0.25, "McNemar (exact), 4 documents")


def test_the_paired_z_of_numbers(write: Callable[..., Path]) -> None:
    chance = random.Random(0)
    a = [{"acc": chance.random()} for _ in range(50)]
    b = [{"acc": score["acc"] + 0.01 + 0.01 * chance.random()} for score in a]
    found = compare(Results.read(write("a", a)), Results.read(write("b", b)), ("a", "b"))[0]
    assert found.method == "paired z, 50 documents" and found.p is not None and found.p < 1e-6


def test_bits_per_byte_are_paired_as_a_ratio(write: Callable[..., Path]) -> None:
    sizes = [10.0 + i for i in range(40)]
    a = [{"bits": 2.0 * size + (i % 3), "bytes": size} for i, size in enumerate(sizes)]
    b = [{"bits": score["bits"] - 0.1 * score["bytes"], "bytes": score["bytes"]} for score in a]
    row = {"bpb": 2.0, "bpb_stderr": 0.3, "n": 40}
    found = compare(Results.read(write("a", a, row=row)), Results.read(write("b", b, row=row)), ("a", "b"))[0]
    assert found.method == "paired z (ratio), 40 documents"
    assert found.value == pytest.approx(-0.1) and found.stderr == pytest.approx(0, abs=1e-12)


def test_equal_models_rarely_differ_significantly(write: Callable[..., Path]) -> None:
    chance = random.Random(1)
    below = 0
    for _ in range(200):
        won = sum(chance.random() < 0.5 for _ in range(60))
        below += mcnemar(won, 60 - won) < 0.05
    assert below <= 200 * 0.05 + 8  # the exact test is conservative; 8: about three standard deviations


def test_report_compares_files(write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a = write("a", [{"acc": float(i % 2)} for i in range(100)])
    b = write("b", [{"acc": 1.0 if i < 20 else float(i % 2)} for i in range(100)])
    assert run(["report", str(a), str(b), "--out", str(tmp_path / "r.md"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"][0]["method"] == "McNemar (exact), 100 documents"
    assert [Path(path).read_bytes()[:4] for path in found["pictures"]] == [b"\x89PNG"]
    page = (tmp_path / "r.md").read_text()
    assert "| b | quiz | acc | +0.1000 ± 0.0302 | **0.0020** | McNemar (exact), 100 documents |" in page
    assert "![values with 95% intervals](r.png)" in page
    assert run(["report", str(a)]) == 0
    assert "Differences" not in (tmp_path / "report.md").read_text()


def test_report_reads_the_harness_s_own_files(write: Callable[..., Path], tmp_path: Path) -> None:
    theirs = {
        "results": {"quiz": {"alias": "quiz", "acc,none": 0.75, "acc_stderr,none": 0.05}},
        "n-samples": {"quiz": {"original": 100, "effective": 80}},
        "higher_is_better": {"quiz": {"acc": True}},
        "model_name": "theirs",
    }
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    ours = write("ours", [{"acc": float(i % 2)} for i in range(100)])
    assert run(["report", str(ours), str(tmp_path / "theirs.json"), "--out", str(tmp_path / "r.md")]) == 0
    assert "two-sample z" in (tmp_path / "r.md").read_text()


def test_faults_are_one_sentence(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*args: object) -> str:
        assert run(["report", *map(str, args)]) == 1
        return capsys.readouterr().err

    a = write("a", [{"acc": 0.0}, {"acc": 1.0}])
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "other.json").write_text('{"results": 1}')
    (tmp_path / "run").mkdir()
    assert "torn.json is not JSON" in message(a, tmp_path / "torn.json")
    assert "other.json holds no results of an evaluation" in message(a, tmp_path / "other.json")
    assert "No such file" in message(a, tmp_path / "none.json")
    assert "has no results to compare: write some with llmkit eval --out" in message(a, tmp_path / "run")
    write_results(tmp_path / "b.json", results({"another": {"acc": 0.5, "n": 2}}), {})
    assert "have no metric of a task in common" in message(a, tmp_path / "b.json")
