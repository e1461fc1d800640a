"""Tasks against the lm-evaluation-harness run beside them: same documents, same model, same predictions and metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from llmkit.checkpoint import Checkpoint
from llmkit.engines import open_engine
from llmkit.eval_chat import Chat
from llmkit.eval_requests import Encoder
from llmkit.evaldata import draw, json_lines
from llmkit.evaluation import Evaluation, Sample
from llmkit.evaluator import Generate, Likelihood
from llmkit.testing.tiny import tiny_checkpoint

TIE = 1e-4
LAYOUT = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag"),
    "arc_easy": ("arc/arc_easy.yaml", "arc/easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc/challenge"),
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", "mmlu"),
    "mmlu_us_foreign_policy": ("mmlu/default/mmlu_us_foreign_policy.yaml", "mmlu"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "gsm8k"),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml", "gsm8k"),
}


def harness_task(
    task: str, data: Path, shots: int, sampler: Callable[[Mapping[str, Any]], list[Any]] | None = None
) -> Any:
    """The harness's task on local files."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config_file, folder = LAYOUT[task]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / config_file, resolve_func=True)
    files = {path.stem: str(path) for path in (data / folder).glob("*.jsonl")}
    for split in ("training", "validation", "test", "fewshot"):
        if config.get(f"{split}_split") not in files:
            config[f"{split}_split"] = None
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(data / ".cache")},
        "num_fewshot": shots,
    }
    if sampler is None and config.get("fewshot_split") is None:
        config.pop("fewshot_split", None)
    built = ConfigurableTask(config=config)
    built.set_fewshot_seed(1234)
    if sampler is not None:
        built.fewshot_cfg.split = built.config.test_split  # only then does it tell the sampler the document
        built.sampler.sample = lambda n, eval_doc=None, **_: sampler(eval_doc)
    return built


def harness(
    task: str,
    checkpoint: Checkpoint,
    data: Path,
    shots: int,
    dtype: str,
    sampler: Callable[[Mapping[str, Any]], list[Any]] | None = None,
    chat: Chat | None = None,
) -> Any:
    """The harness's results, with samples, on local files."""
    built = harness_task(task, data, shots, sampler)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    kind = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    model = HFLM(pretrained=str(checkpoint.path), device="cpu", dtype=kind, batch_size=8)
    asked = {
        "apply_chat_template": chat is not None,
        "system_instruction": chat.system_prompt if chat else None,
        "fewshot_as_multiturn": chat.fewshot_as_turns if chat else False,
    }
    return lm_eval.evaluate(model, {task: built}, log_samples=True, bootstrap_iters=100, **asked)


def ours(
    task: str, checkpoint: Checkpoint, data: Path, shots: int | None, dtype: str, engine: str, chat: Chat | None = None
) -> tuple[dict[int, Sample], dict[str, Any]]:
    evaluation = Evaluation(checkpoint, [task], data_dir=data, num_fewshot=shots, chat=chat)
    with open_engine(checkpoint, engine, dtype=dtype, device="cpu") as opened:
        samples = {sample.index: sample for sample in evaluation.run(opened)}
    return samples, evaluation.results()["results"][task]


def copy_lines(source: Path, target: Path, keep: Callable[[Mapping[str, Any]], bool], limit: int) -> None:
    rows = [row for _, row in json_lines(source) if keep(row)][:limit]
    assert len(rows) == limit
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def compare_choices(
    task: str,
    checkpoint: Checkpoint,
    data: Path,
    *,
    shots: int = 0,
    dtype: str = "fp32",
    tolerance: float = 2e-3,
    sampler: Callable[[Mapping[str, Any]], list[Any]] | None = None,
    engine: str = "transformers",
    chat: Chat | None = None,
) -> None:
    theirs = harness(task, checkpoint, data, shots, dtype, sampler, chat)
    samples, figures = ours(task, checkpoint, data, shots, dtype, engine, chat)
    assert len(theirs["samples"][task]) == len(samples) == figures["n"]
    tied = set()
    for reference in theirs["samples"][task]:
        sample = samples[reference["doc_id"]]
        asked = [(request.context, request.continuation) for request in sample.requests]  # type: ignore[union-attr]
        assert asked == [tuple(pair) for pair in reference["arguments"]]
        expected = [float(response[0][0]) for response in reference["resps"]]
        found = [answer.logprob for answer in sample.answers if isinstance(answer, Likelihood)]
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)
        best = sorted(expected)[-2:]
        if best[1] - best[0] < TIE:
            tied.add(reference["doc_id"])
            continue
        assert max(range(len(found)), key=found.__getitem__) == max(range(len(found)), key=expected.__getitem__)
        for metric in sample.scores:
            assert sample.scores[metric] == reference[metric], (reference["doc_id"], metric)
    if not tied:
        for metric in ("acc", "acc_norm") if "acc_norm" in figures else ("acc",):
            assert figures[metric] == pytest.approx(theirs["results"][task][f"{metric},none"])
            assert figures[f"{metric}_stderr"] == pytest.approx(theirs["results"][task][f"{metric}_stderr,none"])


def compare_answers(
    task: str, checkpoint: Checkpoint, data: Path, *, shots: int, engine: str = "transformers", chat: Chat | None = None
) -> list[str]:
    def sampler(document: Mapping[str, Any]) -> list[Any]:
        rows = [row for _, row in json_lines(data / "gsm8k" / "train.jsonl")]
        return draw(rows, shots, 1234, document["question"], [document])

    theirs = harness(task, checkpoint, data, shots, "fp32", sampler if task == "gsm8k" else None, chat)
    samples, figures = ours(task, checkpoint, data, shots, "fp32", engine, chat)
    strict = [sample for sample in theirs["samples"][task] if sample["filter"] == "strict-match"]
    assert len(strict) == len(samples)
    for reference in strict:
        sample = samples[reference["doc_id"]]
        assert sample.requests[0].prompt == reference["arguments"][0][0]  # type: ignore[union-attr]
        # the harness decodes the answer alone, and a sentencepiece tokenizer then drops the space at its beginning
        assert str(sample.answers[0]).lstrip(" ") == reference["resps"][0][0].lstrip(" ")
        assert sample.scores["exact_match"] == reference["exact_match"]
    for ours_name, their_name in (("exact_match", "strict-match"), ("exact_match_flexible", "flexible-extract")):
        assert figures[ours_name] == theirs["results"][task][f"exact_match,{their_name}"]
    return [str(sample.answers[0]) for sample in samples.values()]


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Checkpoint:
    return Checkpoint.open(test_data / "models" / "stories260k-hf")


@pytest.fixture(scope="module")
def data(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first documents of each task, as local files."""
    folder = tmp_path_factory.mktemp("eval-data")
    for file in ("hellaswag/validation", "arc/easy/test", "arc/challenge/test"):
        copy_lines(test_data / f"{file}.jsonl", folder / f"{file}.jsonl", lambda row: True, 32)
    copy_lines(test_data / "arc/easy/test.jsonl", folder / "arc/easy/train.jsonl", lambda row: True, 12)
    copy_lines(test_data / "gsm8k/test.jsonl", folder / "gsm8k/test.jsonl", lambda row: len(row["question"]) < 180, 6)
    copy_lines(test_data / "gsm8k/train.jsonl", folder / "gsm8k/train.jsonl", lambda row: len(row["answer"]) < 90, 30)
    for split, count in (("dev", 5), ("test", 12)):
        copy_lines(
            test_data / f"mmlu/{split}.jsonl",
            folder / f"mmlu/{split}.jsonl",
            lambda row: row["subject"] == "anatomy",
            count,
        )
    return folder


@pytest.mark.parametrize("task", ["hellaswag", "arc_easy", "arc_challenge"])
def test_choices_are_the_harness_s(task: str, stories: Checkpoint, data: Path) -> None:
    compare_choices(task, stories, data)


def test_the_embedded_engine_gives_the_same(stories: Checkpoint, data: Path) -> None:
    compare_choices("arc_easy", stories, data, engine="llmkit")
    compare_choices("mmlu_anatomy", stories, data, shots=5, engine="llmkit")
    compare_answers("gsm8k", stories, data, shots=1, engine="llmkit")


def test_examples_stand_where_the_harness_puts_them(stories: Checkpoint, data: Path) -> None:
    rows = [row for _, row in json_lines(data / "arc/easy/train.jsonl")]

    def sampler(document: Mapping[str, Any]) -> list[Any]:
        return draw(rows, 2, 1234, f"Question: {document['question']}\nAnswer:", [document])

    compare_choices("arc_easy", stories, data, shots=2, sampler=sampler)


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_is_the_harness_s(shots: int, data: Path, tmp_path: Path) -> None:
    compare_choices("mmlu_anatomy", tiny_checkpoint(tmp_path / "model", context=2500), data, shots=shots)


def test_what_is_too_long_is_cut_as_by_the_harness(stories: Checkpoint, data: Path) -> None:
    compare_choices("mmlu_anatomy", stories, data, shots=5)


@pytest.mark.parametrize(("task", "shots"), [("gsm8k", 1), ("gsm8k_cot", 8)])
def test_written_answers_are_the_harness_s(task: str, shots: int, stories: Checkpoint, data: Path) -> None:
    answers = compare_answers(task, stories, data, shots=shots)
    assert len(set(answers)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "file", "count", "shots"),
    [("hellaswag", "hellaswag/validation", 8, 0), ("arc_easy", "arc/easy/test", 12, 0), ("mmlu_anatomy", "", 4, 5)],
)
def test_choices_of_a_real_model(
    task: str, file: str, count: int, shots: int, smollm2_path: Path, test_data: Path, data: Path, tmp_path: Path
) -> None:
    if file:
        copy_lines(test_data / f"{file}.jsonl", tmp_path / f"{file}.jsonl", lambda row: True, count)
    else:
        copy_lines(data / "mmlu/dev.jsonl", tmp_path / "mmlu/dev.jsonl", lambda row: True, 5)
        copy_lines(data / "mmlu/test.jsonl", tmp_path / "mmlu/test.jsonl", lambda row: True, count)
    compare_choices(task, Checkpoint.open(smollm2_path), tmp_path, shots=shots)


@pytest.mark.slow
def test_written_answers_of_a_real_model(smollm2_path: Path, data: Path, tmp_path: Path) -> None:
    copy_lines(data / "gsm8k/test.jsonl", tmp_path / "gsm8k/test.jsonl", lambda row: True, 2)
    copy_lines(data / "gsm8k/train.jsonl", tmp_path / "gsm8k/train.jsonl", lambda row: True, 30)
    answers = compare_answers("gsm8k", Checkpoint.open(smollm2_path), tmp_path, shots=5)
    assert all("####" in answer for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "shots", "system", "turns"),
    [
        ("mmlu_anatomy", 2, "Be brief.", True),  # has a description, which joins the system prompt
        ("mmlu_anatomy", 2, "", False),
        ("hellaswag", 0, "", False),
    ],
)
def test_choices_of_a_chat_model(
    task: str, shots: int, system: str, turns: bool, smollm2_path: Path, data: Path, tmp_path: Path
) -> None:
    for file, count in (("mmlu/dev", 5), ("mmlu/test", 4), ("hellaswag/validation", 4)):
        copy_lines(data / f"{file}.jsonl", tmp_path / f"{file}.jsonl", lambda row: True, count)
    checkpoint = Checkpoint.open(smollm2_path)
    compare_choices(task, checkpoint, tmp_path, shots=shots, chat=Chat(checkpoint, system, turns))


@pytest.mark.slow
@pytest.mark.parametrize(("system", "turns"), [("You are good at sums.", True), ("", False)])
def test_prompts_to_a_chat_model(system: str, turns: bool, smollm2_path: Path, data: Path) -> None:
    """Text and token ids of a task that generates; what follows from them is compared above."""
    from transformers import AutoTokenizer

    checkpoint = Checkpoint.open(smollm2_path)
    rows = [row for _, row in json_lines(data / "gsm8k" / "train.jsonl")]
    built = harness_task("gsm8k", data, 3, lambda document: draw(rows, 3, 1234, document["question"], [document]))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    built.build_all_requests(
        system_instruction=system or None,
        apply_chat_template=True,
        fewshot_as_multiturn=turns,
        chat_template=lambda history, **options: tokenizer.apply_chat_template(history, tokenize=False, **options),
        tokenizer_name="",
    )
    chat = Chat(checkpoint, system, turns)
    task = Evaluation(checkpoint, ["gsm8k"], data_dir=data, num_fewshot=3, chat=chat).tasks["gsm8k"]
    requests = [chat.requests(task.requests(document)) for document in task.documents()]
    prompts = [request.prompt for (request,) in requests if isinstance(request, Generate)]
    assert prompts == [instance.arguments[0] for instance in built.instances] and len(prompts) == 6
    encoder = Encoder(checkpoint.tokenizer, 8192)
    for (request,) in requests:
        assert isinstance(request, Generate)
        assert list(encoder.prompt(request)[0]) == tokenizer.encode(request.prompt)
