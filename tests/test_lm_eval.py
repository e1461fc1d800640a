"""Tasks of lm-eval through llmkit, against lm-eval with its own HFLM; llmkit as lm-eval's model; local data; faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from llmkit.checkpoint import Checkpoint
from llmkit.cli.main import run
from llmkit.engine import ScoreRequest
from llmkit.engines import open_engine
from llmkit.evaldata import json_lines
from llmkit.evaluation import Evaluation, Sample
from llmkit.evaluator import Generate, LogLikelihood
from llmkit.plugins import UnknownComponent, get_plugins
from llmkit.testing.tiny import TEXT, tiny_checkpoint
from llmkit_mmlu import SUBJECTS

ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: endings
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: mcc
  - metric: brier_score
"""


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Checkpoint:
    return Checkpoint.open(test_data / "models" / "stories260k-hf")


@pytest.fixture(scope="module")
def data(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first documents of some sets, as local files in llmkit's layout."""
    folder = tmp_path_factory.mktemp("lm-eval-data")
    counts = {"hellaswag/validation": 24, "arc/easy/test": 24, "gsm8k/test": 4, "gsm8k/train": 20}
    for file, count in counts.items():
        rows = [row for _, row in json_lines(test_data / f"{file}.jsonl")][:count]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "arc/easy/train.jsonl").write_bytes((folder / "arc/easy/test.jsonl").read_bytes())
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose tokenizer puts no begin token in front, which lm-eval would count into whole texts."""
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", context=512)


def hf_model(checkpoint: Checkpoint) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint.path), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def hflm(stories: Checkpoint) -> Any:
    return hf_model(stories)


def harness(model: Any, folder: Path, task: str, shots: int | None = None) -> Any:
    """lm-eval alone, on a YAML file in the folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=manager, num_fewshot=shots, bootstrap_iters=100, log_samples=True
    )


def local_yaml(folder: Path, base: str, files: dict[str, Path], splits: dict[str, str | None]) -> str:
    """A YAML file of a task of lm-eval's on local files, as lm-eval wants it; its name."""
    import lm_eval

    source = Path(lm_eval.__file__).parent / "tasks" / base
    config: dict[str, Any] = {
        "include": str(source),
        "task": f"local_{source.stem}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        **splits,
    }
    (folder / f"{source.stem}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return str(config["task"])


def evaluate(checkpoint: Checkpoint, task: str, **options: Any) -> tuple[dict[int, Sample], dict[str, Any]]:
    evaluation = Evaluation(checkpoint, [task], **options)
    with open_engine(checkpoint, "llmkit", dtype="fp32") as engine:
        samples = {sample.index: sample for sample in evaluation.run(engine)}
    return samples, evaluation.results()


def asked(sample: Sample) -> list[tuple[Any, ...]]:
    requests: list[tuple[Any, ...]] = []
    for request in sample.requests:
        if isinstance(request, LogLikelihood):
            requests.append((request.context, request.continuation))
        else:
            assert isinstance(request, Generate)
            requests.append((request.prompt,))
    return requests


@pytest.mark.parametrize(
    ("task", "base", "folder", "splits", "shots"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag", {"training_split": None, "test_split": None}, 0),
        ("arc_easy", "arc/arc_easy.yaml", "arc/easy", {"validation_split": None}, 3),
        ("gsm8k", "gsm8k/gsm8k.yaml", "gsm8k", {}, 2),
    ],
)
def test_tasks_are_those_of_lm_eval(
    task: str,
    base: str,
    folder: str,
    splits: dict[str, str | None],
    shots: int,
    stories: Checkpoint,
    hflm: Any,
    data: Path,
    tmp_path: Path,
) -> None:
    files = {path.stem: path for path in (data / folder).glob("*.jsonl")}
    name = local_yaml(tmp_path, base, files, splits)
    theirs = harness(hflm, tmp_path, name, shots)
    samples, results = evaluate(stories, f"lm_eval:{task}", data_dir=data, num_fewshot=shots)
    figures = results["results"][f"lm_eval:{task}"]
    for reference in theirs["samples"][name]:
        sample = samples[reference["doc_id"]]
        width = len(asked(sample)[0])
        assert asked(sample) == [tuple(arguments[:width]) for arguments in reference["arguments"]]
        label = "" if reference["filter"] == "none" else f",{reference['filter']}"
        for metric in reference["metrics"]:
            assert sample.scores[metric + label] == reference[metric]
    expected = theirs["results"][name]
    assert figures["n"] == expected["sample_len"] == len(samples)
    for key, value in expected.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and not metric.endswith("_stderr"):
            label = metric if filter_name == "none" else key
            assert figures[label] == pytest.approx(value)
            assert figures[f"{label}_stderr"] == pytest.approx(expected[f"{metric}_stderr,{filter_name}"])
    assert results["n-shot"][f"lm_eval:{task}"] == shots
    assert results["versions"][f"lm_eval:{task}"].startswith(str(theirs["versions"][name]))


@pytest.mark.parametrize(
    ("text", "file"), [(ROLLING, "gsm8k/test.jsonl"), (CHOICE, "hellaswag/validation.jsonl")], ids=["text", "choice"]
)
def test_figures_that_are_no_means(text: str, file: str, plain: Checkpoint, data: Path, tmp_path: Path) -> None:
    """Also: a task of one's own in a YAML file."""
    path = tmp_path / "task.yaml"
    path.write_text(text.replace("FILE", str(data / file)))
    name = text.split()[1]
    expected = harness(hf_model(plain), tmp_path, name)["results"][name]
    _, results = evaluate(plain, str(path))
    figures = results["results"][str(path)]
    metrics = [key.partition(",")[0] for key in expected if key.endswith(",none") and "_stderr" not in key]
    assert metrics and set(metrics) <= set(figures)
    for metric in metrics:
        assert figures[metric] == pytest.approx(expected[f"{metric},none"], rel=1e-4)
    assert set(results["higher_is_better"][str(path)]) == set(metrics)
    if "mcc" in metrics:
        assert figures["mcc_stderr"] > 0 and "brier_score_stderr" not in figures


def test_a_group_has_its_members_and_lm_eval_s_mean(stories: Checkpoint, tmp_path: Path) -> None:
    rows = [
        {"question": f"{subject} {i}?", "subject": subject, "choices": list("pqrs"), "answer": i % 4}
        for subject in SUBJECTS["stem"]
        for i in range(3 if subject == "anatomy" else 2)
    ]
    for split in ("dev", "test"):
        (tmp_path / "mmlu").mkdir(exist_ok=True)
        (tmp_path / f"mmlu/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, results = evaluate(stories, "lm_eval:mmlu_stem", data_dir=tmp_path)
    figures = results["results"]
    members = {f"lm_eval:mmlu_{subject}" for subject in SUBJECTS["stem"]}
    assert set(figures) == {"lm_eval:mmlu_stem", *members}
    assert figures["lm_eval:mmlu_anatomy"]["n"] == 3
    total = sum(figures[name]["n"] for name in members)
    mean = sum(figures[name]["n"] * figures[name]["acc"] for name in members) / total
    assert figures["lm_eval:mmlu_stem"] == {
        "acc": pytest.approx(mean),
        "acc_stderr": figures["lm_eval:mmlu_stem"]["acc_stderr"],
        "n": total,
    }
    # the same questions as a task of llmkit's own
    _, own = evaluate(stories, "mmlu_stem", data_dir=tmp_path, num_fewshot=0)
    assert own["results"]["mmlu_stem"]["acc_stderr"] == pytest.approx(figures["lm_eval:mmlu_stem"]["acc_stderr"])
    assert own["results"]["mmlu_stem"]["acc"] == pytest.approx(mean)


def test_examples_do_not_depend_on_the_limit_or_on_who_asks_again(stories: Checkpoint, data: Path) -> None:
    def prompts(limit: int) -> list[Any]:
        evaluation = Evaluation(stories, ["lm_eval:gsm8k"], data_dir=data, num_fewshot=2, limit=limit)
        task = evaluation.tasks["lm_eval:gsm8k"]
        list(zip(range(2), task.documents()))  # somebody else reads some
        return [task.requests(document)[0] for _, document in zip(range(limit), task.documents())]

    assert prompts(4)[:2] == prompts(2)
    assert len({request.prompt for request in prompts(4)}) == 4


# --- names


def test_own_tasks_win_and_the_prefix_asks_for_lm_eval_s() -> None:
    plugins = get_plugins()
    assert plugins.evaluator("hellaswag").__module__ == "llmkit_hellaswag"
    assert plugins.evaluator("lm_eval:hellaswag").summary() == "Task hellaswag of lm-eval."
    assert plugins.evaluator("wikitext").summary() == "Task wikitext of lm-eval."
    assert plugins.evaluator("leaderboard").summary() == "Group leaderboard of lm-eval."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswagg", "unknown task 'hellaswagg': did you mean hellaswag"),
        ("truthfulqa_mc", "did you mean truthfulqa_mc2 or truthfulqa_mc1"),
        ("lm_eval:winogrand", "unknown task 'winogrand' of lm_eval: did you mean winogrande"),
        ("lmeval:winogrande", "unknown task family 'lmeval': did you mean lm_eval?"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownComponent, match=message):
        get_plugins().evaluator(name)


def test_names_are_known_without_importing_lm_eval() -> None:
    get_plugins().evaluator("wikitext")  # the index is there now
    code = (
        "import sys\nfrom llmkit.plugins import get_plugins\n"
        "get_plugins().evaluator('lm_eval:wikitext')\n"
        "print(*({'lm_eval', 'datasets', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "" and done.stderr == ""


# --- faults


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "checkpoint")


def fault(checkpoint: Checkpoint, task: str, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        Evaluation(checkpoint, [task], **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_data_is_named(tiny: Checkpoint, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = fault(tiny, "lm_eval:hellaswag", data_dir=tmp_path / "empty")
    assert "there is no hellaswag/validation.jsonl or Rowan/hellaswag/validation.jsonl in" in message
    assert "--task-data hellaswag=validation:FILE" in message
    file = data / "hellaswag/validation.jsonl"
    message = fault(tiny, "lm_eval:hellaswag", num_fewshot=1, task_data={"hellaswag": {"validation": file}})
    assert message == "task 'hellaswag' needs its split 'train', and there are files for: validation"
    message = fault(tiny, "piqa", task_data={"piqa": {"validation": file}})
    assert "task 'piqa' of lm-eval cannot be set up" in message and "goal" in message  # the field that it misses
    (tmp_path / "bad.jsonl").write_text('{"ctx": "x"}\n{')
    message = fault(tiny, "lm_eval:hellaswag", task_data={"lm_eval:hellaswag": {"validation": tmp_path / "bad.jsonl"}})
    assert f"{tmp_path}/bad.jsonl, line 2 is not JSON" in message
    assert "is not among the tasks: bpb" in fault(tiny, "bpb", task_data={"piqa": {"validation": file}})


def test_what_cannot_be_run_is_refused(tiny: Checkpoint, data: Path) -> None:
    message = fault(tiny, "squadv2", task_data={"squadv2": {"validation": data / "gsm8k/test.jsonl"}})
    assert "is a Python class of lm-eval that loads its own data" in message
    assert "cannot be set up" in fault(tiny, "wikitext")  # no network in tests


def test_task_data_is_for_own_tasks_too(tiny: Checkpoint, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"hellaswag=validation:{data}/hellaswag/validation.jsonl"
    args = [str(tiny.path), "--tasks", "hellaswag,lm_eval:hellaswag", "--limit", "2", "--no-cache", "--json"]
    assert run(["eval", *args, "--task-data", place]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["hellaswag"] == results["lm_eval:hellaswag"]
    for wrong, message in {
        "hellaswag=validation": "--task-data is TASK=SPLIT:FILE, not 'hellaswag=validation'",
        "hellaswag=validation:/none": "there is no file /none",
    }.items():
        assert run(["eval", *args, "--task-data", wrong]) == 2
        assert message in capsys.readouterr().err


# --- llmkit as a model of lm-eval


@pytest.fixture
def _own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # lm-eval's command line reads and changes it


@pytest.mark.usefixtures("_own_argv")
def test_lm_eval_runs_llmkit_as_its_model(
    stories: Checkpoint, hflm: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    choice = CHOICE.replace("FILE", str(data / "hellaswag/validation.jsonl"))
    choice = choice.replace("  - metric: mcc\n", "")  # lm-eval takes 100,000 resamples for its error
    (tmp_path / "tasks" / "choice.yaml").write_text(choice)
    files = {path.stem: path for path in (data / "gsm8k").glob("*.jsonl")}
    written = local_yaml(tmp_path / "tasks", "gsm8k/gsm8k.yaml", files, {})
    names = ["local_choice", written]
    args = ["--model", "llmkit", "--model_args", f"checkpoint={stories.path},dtype=fp32", "--num_fewshot", "1"]
    out = tmp_path / "out"
    assert run(["lm-eval", "run", *args, "--tasks", ",".join(names), "--include_path", str(tmp_path / "tasks"),
                "--output_path", str(out)]) == 0  # fmt: skip
    assert "local_choice" in capsys.readouterr().out
    (written_file,) = out.rglob("results_*.json")
    found = json.loads(written_file.read_text())
    assert found["config"]["engine"] == "llmkit"
    for name in names:
        expected = harness(hflm, tmp_path / "tasks", name, 1)["results"][name]
        for key, value in expected.items():
            if "," in key and "_stderr" not in key:
                assert found["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)


def test_whole_texts_as_lm_eval_s_model(plain: Checkpoint) -> None:
    from lm_eval.api.instance import Instance

    from llmkit_lm_eval.model import LlmkitLM

    texts = ["two and two make four", TEXT[:1300], TEXT[5:517]]  # the second in three windows
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    found = LlmkitLM(str(plain.path), dtype="fp32").loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(hf_model(plain).loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4)


def test_chat_templates_of_lm_eval_s_model(plain: Checkpoint, tmp_path: Path) -> None:
    """lm-eval hands the rendered text back as plain text: special tokens in it must still be read as such."""
    from lm_eval.api.instance import Instance

    from llmkit_lm_eval.model import LlmkitLM

    shutil.copytree(plain.path, tmp_path / "chat")
    template = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    model = LlmkitLM(str(tmp_path / "chat"), dtype="fp32")
    text = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|endoftext|>user: hi"
    ((logprob, _),) = model.loglikelihood([Instance("loglikelihood", {}, (str(text), " yes"), 0)], disable_tqdm=True)
    eot = plain.tokenizer.eot_id
    assert eot is not None
    with open_engine(plain, "llmkit", dtype="fp32") as engine:
        encode = plain.tokenizer.encode
        (expected,) = engine.score([ScoreRequest(0, (eot, *encode("user: hi")), tuple(encode(" yes")))])
    assert logprob == pytest.approx(expected.logprob, abs=1e-4)
