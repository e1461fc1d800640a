"""`llmkit eval`: table, JSON, files of results and samples, and one clear sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.cli.main import run
from llmkit.testing.tiny import tiny_checkpoint, tiny_data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("eval") / "checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_data(tmp_path_factory.mktemp("eval") / "data", val_fraction=0.3).path)


def evaluate(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert run(["eval", *args]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_json_is_one_object(checkpoint: Checkpoint, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--tasks", "bpb", "--data", data, "--engine", "transformers", "--json"]
    out, _ = evaluate(capsys, str(checkpoint.path), *args)
    results = json.loads(out)
    assert set(results["results"]["bpb"]) == {"bpb", "bpb_stderr", "n"}
    assert results["results"]["bpb"]["n"] == 6
    assert results["config"]["engine"] == "transformers"
    assert results["config"]["dtype"] == "fp32"


def test_a_table_otherwise(checkpoint: Checkpoint, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = evaluate(capsys, str(checkpoint.path), "--tasks", " bpb , bpb,", "--data", data, "--limit", "2")
    head, row = out.splitlines()
    assert head.split() == ["task", "version", "shots", "n", "metric", "better", "value", "stderr"]
    assert row.split()[:6] == ["bpb", "1", "0", "2", "bpb", "lower"]
    assert float(row.split()[6]) > 0


def test_results_and_samples_go_to_files(
    checkpoint: Checkpoint, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_file = tmp_path / "new" / "results.json"
    args = [str(checkpoint.path), "--tasks", "bpb", "--data", data, "--out", str(out_file), "--json"]
    out, err = evaluate(capsys, *args)
    written, figures = json.loads(out_file.read_text()), json.loads(out)["results"]["bpb"]
    assert written["results"]["bpb"]["bpb,none"] == figures["bpb"]  # the file is in lm-eval's schema
    assert written["n-samples"] == {"bpb": {"original": 6, "effective": 6}}
    assert f"{figures['bpb']:.4f} ± {figures['bpb_stderr']:.4f}" in out_file.with_suffix(".md").read_text()
    samples = [json.loads(line) for line in (tmp_path / "new" / "results.samples.jsonl").read_text().splitlines()]
    assert sorted(sample["doc_id"] for sample in samples) == list(range(6))
    bits = sum(sample["scores"]["bits"] for sample in samples)
    assert bits / sum(sample["scores"]["bytes"] for sample in samples) == json.loads(out)["results"]["bpb"]["bpb"]
    assert "results.samples.jsonl" in err


def test_tasks_read_local_data_and_give_their_figures(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "arc/easy/test.jsonl": {
            "question": "?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "humaneval/HumanEval.jsonl": {
            "task_id": "T/0",
            "prompt": "def f():\n",
            "entry_point": "f",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
        },
    }
    for name, row in rows.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    args = ["--tasks", "arc_easy,humaneval", "--data-dir", str(tmp_path), "--limit", "1", "--samples", "2"]
    out, _ = evaluate(capsys, str(checkpoint.path), *args, "--unsafe-execute", "--temperature", "0.5", "--json")
    results = json.loads(out)["results"]
    assert set(results["arc_easy"]) == {"acc", "acc_norm", "n"} and results["arc_easy"]["n"] == 1
    assert results["humaneval"] == {"pass@1": 0.0, "n": 1}  # a random model writes no function


@pytest.mark.parametrize("args", [["--list"], ["--tasks", "list"]])
def test_tasks_are_listed(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Bits per byte" in evaluate(capsys, *args)[0]
    tasks = json.loads(evaluate(capsys, *args, "--json")[0])["tasks"]
    assert "bpb" in [task["name"] for task in tasks]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name the tasks with --tasks"),
        (["--tasks", ","], "name the tasks with --tasks"),
        (["--tasks", "bpb,bpd"], "unknown task 'bpd': did you mean bpb"),
        (["--tasks", "bpb", "--limit", "0"], "--limit"),
        (["--tasks", "bpb", "--engine", "transfomers"], "unknown engine 'transfomers': did you mean transformers?"),
        (["--tasks", "bpb", "--num-fewshot", "-1"], "--num-fewshot"),
        (["--tasks", "helaswag"], "unknown task 'helaswag': did you mean hellaswag"),
        (["--tasks", "humaneval", "--samples", "0"], "--samples"),
        (
            ["--tasks", "bpb", "--out", "results.md"],
            "--out is for JSON, and Markdown comes beside it: name it results.json",
        ),
        (["--tasks", "bpb", "--out", "."], "is a directory"),
    ],
)
def test_wrong_use_is_exit_code_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any checkpoint is looked at."""
    out, err = evaluate(capsys, "no-such-checkpoint", *args, code=2)
    assert message in err and not out


def test_an_unknown_text_is_exit_code_2(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = evaluate(capsys, str(checkpoint.path), "--tasks", "bpb", "--data", "stdlip", code=2)
    assert "there is no file, folder or data source 'stdlip': did you mean stdlib?" in err


def test_failures_are_exit_code_1(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*args: str) -> str:
        out, err = evaluate(capsys, *args, "--tasks", "bpb", code=1)
        assert not out and "Traceback" not in err
        return err

    model = str(checkpoint.path)
    assert "there is no checkpoint" in message(str(tmp_path / "none"))
    assert "does not say what it was trained on" in message(model)
    assert "there is no folder" in message(model, "--data-dir", str(tmp_path / "none"))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "is not UTF-8 text" in message(model, "--data", str(tmp_path / "latin.txt"))
    (tmp_path / "file").write_text("")
    assert "file" in message(model, "--data", str(tmp_path / "latin.txt"), "--out", str(tmp_path / "file" / "r.json"))
