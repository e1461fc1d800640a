"""The task families: exact prompts, scores, examples by document, parts of MMLU, and faults of local data."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.engine import Chunk, Engine, GenerateRequest, ScoreRequest, ScoreResult
from llmkit.evaldata import draw
from llmkit.evaluation import Evaluation
from llmkit.evaluator import EvalContext, Evaluator, Generate, Likelihood, LogLikelihood, Metric, mean, pooled
from llmkit.plugins import get_plugins
from llmkit.testing import EvaluatorContract
from llmkit.testing.tiny import tiny_checkpoint
from llmkit.tokenizer import load_tokenizer
from llmkit_mmlu import GROUP_OF, SUBJECTS

BYTES = load_tokenizer("byte")
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] Bread [title] Knead it.  It rests.",
    "ctx_b": "then she",
    "endings": ["sings [step] a song.", "bakes it.", "runs away.", "sleeps."],
    "label": "1",
}
ARC: dict[str, Any] = {
    "question": "What melts?",
    "choices": {"text": ["Ice", "Fire", "Wind"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}


def sum_of(i: int) -> dict[str, str]:
    return {"question": f"What is {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}


def question(subject: str, i: int) -> dict[str, Any]:
    return {"question": f" {subject} {i}? ", "subject": subject, "choices": ["p", "q", "r", "s"], "answer": i % 4}


def write(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents of our own in the layout of each task; in MMLU, every subject has 3 or 4."""
    folder = tmp_path_factory.mktemp("tasks")
    write(folder / "hellaswag/validation.jsonl", [HELLASWAG] * 3)
    for level in ("easy", "challenge"):
        write(folder / f"arc/{level}/test.jsonl", [ARC, {**ARC, "question": "What burns?"}])
    write(folder / "gsm8k/train.jsonl", [sum_of(i) for i in range(40)])
    write(folder / "gsm8k/test.jsonl", [sum_of(i) for i in range(100, 110)])
    write(folder / "mmlu/dev.jsonl", [question(s, 10 + i) for s in GROUP_OF for i in range(5)])
    write(folder / "mmlu/test.jsonl", [question(s, i) for s in GROUP_OF for i in range(4 if s == "anatomy" else 3)])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def make(name: str, checkpoint: Checkpoint, data: Path | None, **options: Any) -> Evaluator:
    return get_plugins().evaluator(name)(EvalContext(checkpoint, checkpoint.tokenizer, data_dir=data, **options))


@pytest.mark.parametrize(
    "name",
    ["hellaswag", "arc_easy", "arc_challenge", "mmlu", "mmlu_stem", "mmlu_anatomy", "gsm8k", "gsm8k_cot"],
)
class TestContract(EvaluatorContract):
    @pytest.fixture
    def evaluator(self, name: str) -> type[Evaluator]:
        return get_plugins().evaluator(name)

    @pytest.fixture
    def data_dir(self, data: Path) -> Path:
        return data


# --- prompts


def texts(task: Evaluator, index: int = 0) -> list[tuple[str, str]]:
    document = list(task.documents())[index]
    requests = task.requests(document)
    return [(r.context, r.continuation) for r in requests if isinstance(r, LogLikelihood)]


def test_hellaswag_cleans_its_texts(checkpoint: Checkpoint, data: Path) -> None:
    asked = texts(make("hellaswag", checkpoint, data))
    context = "Baking: Bread. Knead it. It rests. Then she"
    assert asked == [(context, f" {e}") for e in ("sings a song.", "bakes it.", "runs away.", "sleeps.")]


def test_arc_asks_for_the_text_of_a_choice(checkpoint: Checkpoint, data: Path) -> None:
    for name in ("arc_easy", "arc_challenge"):
        task = make(name, checkpoint, data)
        assert texts(task) == [("Question: What melts?\nAnswer:", f" {c}") for c in ("Ice", "Fire", "Wind")]
        assert next(iter(task.documents()))["gold"] == 0


def test_mmlu_begins_with_the_first_questions_of_dev(checkpoint: Checkpoint, data: Path) -> None:
    intro = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    body = "us_foreign_policy {}?\nA. p\nB. q\nC. r\nD. s\nAnswer:"
    shots = "".join(body.format(10 + i) + f" {'ABCD'[(10 + i) % 4]}\n\n" for i in range(5))
    task = make("mmlu_us_foreign_policy", checkpoint, data)
    assert texts(task) == [(intro + shots + body.format(0), f" {letter}") for letter in "ABCD"]
    bare = make("mmlu_us_foreign_policy", checkpoint, data, num_fewshot=0)
    assert texts(bare)[0] == (intro + body.format(0), " A")
    with pytest.raises(ValueError, match="6 examples about us_foreign_policy are wanted, and there are 5"):
        texts(make("mmlu_us_foreign_policy", checkpoint, data, num_fewshot=6))


def prompt(task: Evaluator, index: int = 0) -> Generate:
    (request,) = task.requests(list(task.documents())[index])
    assert isinstance(request, Generate)
    return request


def test_gsm8k_shows_examples_of_the_training_split(checkpoint: Checkpoint, data: Path) -> None:
    asked = prompt(make("gsm8k", checkpoint, data))
    *shots, last = asked.prompt.split("\n\n")
    assert last == "Question: What is 100 and 100?\nAnswer:"
    train = {f"Question: {row['question']}\nAnswer: {row['answer']}" for row in map(sum_of, range(40))}
    assert len(set(shots)) == 5 and set(shots) <= train
    assert (asked.stop, asked.max_tokens) == (("Question:", "</s>", "<|im_end|>"), 256)
    thought = prompt(make("gsm8k_cot", checkpoint, data)).prompt
    assert thought.startswith("Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today.")
    assert thought.count("The answer is") == 8 and thought.endswith("\n\nQ: What is 100 and 100?\nA:")
    assert prompt(make("gsm8k", checkpoint, data, num_fewshot=0)).prompt == last
    with pytest.raises(ValueError, match="9 examples are wanted, and there are 8"):
        prompt(make("gsm8k_cot", checkpoint, data, num_fewshot=9))


def test_examples_depend_on_the_document_and_the_seed_alone(checkpoint: Checkpoint, data: Path) -> None:
    task = make("gsm8k", checkpoint, data)
    alone = [prompt(make("gsm8k", checkpoint, data), index).prompt for index in range(10)]
    assert [task.requests(document)[0].prompt for document in reversed(list(task.documents()))] == alone[::-1]  # type: ignore[union-attr]
    assert len({text.rsplit("\n\n", 1)[0] for text in alone}) == 10
    assert prompt(make("gsm8k", checkpoint, data, seed=1)).prompt != alone[0]


def test_a_document_is_never_its_own_example() -> None:
    pool = ["a", "b", "b", "c", "b", "d"]
    for key in range(50):
        assert sorted(draw(pool, 3, 1, str(key), ["b"])) == ["a", "c", "d"]
    with pytest.raises(ValueError, match="4 examples are wanted, and there are 3"):
        draw(pool, 4, 1, "", ["b"])


# --- scores


def test_acc_takes_the_sum_and_acc_norm_the_sum_per_character(checkpoint: Checkpoint, data: Path) -> None:
    task = make("arc_easy", checkpoint, data)
    document = {"query": "", "choices": ["long choice", "no"], "gold": 0}
    answers = [Likelihood(-6.0, False, 3), Likelihood(-4.0, False, 1)]
    assert task.score(document, answers) == {"acc": 0.0, "acc_norm": 1.0}
    assert task.score({**document, "gold": 1}, [Likelihood(-4.0, False, 3)] * 2)["acc"] == 0.0  # the first of equals


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 200.\n#### 200", 1, 1),
        ("#### $200", 0, 1),  # the strict form has no dollar sign
        ("#### 2,00 and on", 1, 1),  # commas mean nothing
        ("#### 200. Then 7", 1, 0),
        ("So $200.", 0, 1),
        ("nothing", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_reads_an_answer(text: str, strict: int, flexible: int, checkpoint: Checkpoint, data: Path) -> None:
    task = make("gsm8k", checkpoint, data)
    assert task.score(sum_of(100), [text]) == {"exact_match": strict, "exact_match_flexible": flexible}


def test_gsm8k_cot_reads_its_own_form(checkpoint: Checkpoint, data: Path) -> None:
    task = make("gsm8k_cot", checkpoint, data)
    assert task.score(sum_of(100), ["The answer is 200. No, 3"]) == {"exact_match": 1, "exact_match_flexible": 0}
    assert task.score(sum_of(100), ["#### 200"]) == {"exact_match": 0, "exact_match_flexible": 1}


# --- parts


class Guess(Engine):
    """Prefers ` A`, then ` B`, and so on."""

    name = "guess"
    vocab_size, context_length, eos_ids, dtype = BYTES.vocab_size, 10_000, frozenset[int](), "fp32"

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        return cls()

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for request in requests:
            yield ScoreResult(request.id, tuple(-float(t) for t in request.continuation), (False,) * 2)

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        return iter(())

    def cancel(self, request_id: int) -> None: ...


def evaluate(checkpoint: Checkpoint, data: Path, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    evaluation = Evaluation(checkpoint, tasks, data_dir=data, limit=limit)
    for _ in evaluation.run(Guess()):
        pass
    return evaluation.results()


def test_mmlu_has_figures_of_subjects_groups_and_the_whole(checkpoint: Checkpoint, data: Path) -> None:
    results = evaluate(checkpoint, data, ["mmlu"])
    figures = results["results"]
    assert len(figures) == 1 + 4 + 57
    assert set(results["versions"]) == set(results["n-shot"]) == set(results["higher_is_better"]) == set(figures)
    third = mean([1.0, 0.0, 0.0])  # each subject: answers A, B, C; the guess is A
    assert third.stderr is not None
    assert figures["mmlu_virology"] == {"acc": 1 / 3, "acc_stderr": third.stderr, "n": 3}
    assert figures["mmlu_anatomy"]["acc"] == 0.25 and figures["mmlu_anatomy"]["n"] == 4
    assert figures["mmlu_other"]["n"] == 3 * len(SUBJECTS["other"])
    assert figures["mmlu"]["acc"] == pytest.approx(57 / 172)
    quarter = mean([1.0, 0.0, 0.0, 0.0])
    expected = pooled([third] * 18 + [quarter], [3] * 18 + [4])
    assert figures["mmlu_stem"]["acc_stderr"] == pytest.approx(expected.stderr)
    assert figures["mmlu_stem"]["n"] == 58


def test_the_pooled_error_is_that_of_the_harness() -> None:
    metrics, sizes = [Metric(0.25, 0.1), Metric(0.5, 0.2)], [10, 30]
    variance = (9 * 10 * 0.01 + 29 * 30 * 0.04) / (40 - 2)
    whole = pooled(metrics, sizes)
    assert (whole.value, whole.stderr) == pytest.approx((0.4375, math.sqrt(variance / 40)))
    assert pooled([Metric(0.0), Metric(1.0)], [1, 1]) == Metric(0.5, None)


def test_a_group_is_a_task_and_a_subject_has_no_parts(checkpoint: Checkpoint, data: Path) -> None:
    figures = evaluate(checkpoint, data, ["mmlu_humanities", "mmlu_anatomy"])["results"]
    assert set(figures) == {"mmlu_humanities", "mmlu_anatomy", *(f"mmlu_{s}" for s in SUBJECTS["humanities"])}


def test_a_limit_takes_some_of_every_subject(checkpoint: Checkpoint, data: Path) -> None:
    figures = evaluate(checkpoint, data, ["mmlu"], limit=60)["results"]
    assert figures["mmlu"]["n"] == 60
    assert len(figures) == 62 and figures["mmlu_abstract_algebra"]["n"] == 3


# --- data


def message(name: str, checkpoint: Checkpoint, data: Path) -> str:
    with pytest.raises(ValueError) as caught:
        list(make(name, checkpoint, data).documents())
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "file", "row", "expected"),
    [
        ("hellaswag", "hellaswag/validation", {"ctx": "x"}, "field 'ctx_a' is missing: there are 'ctx'"),
        ("hellaswag", "hellaswag/validation", {**HELLASWAG, "label": ""}, "field 'label' is ''"),
        ("hellaswag", "hellaswag/validation", {**HELLASWAG, "label": "4"}, "number 4, and there are 4 choices"),
        ("hellaswag", "hellaswag/validation", {**HELLASWAG, "endings": [1]}, "'endings' is not a list of texts"),
        ("arc_easy", "arc/easy/test", {**ARC, "answerKey": "D"}, "field 'answerKey' is 'D', and the 3 choices"),
        ("arc_challenge", "arc/challenge/test", {**ARC, "choices": "A"}, "field 'choices' is str, not dict"),
        ("mmlu", "mmlu/test", question("alchemy", 1), "field 'subject' is 'alchemy', which is none of the 57"),
        ("mmlu", "mmlu/test", {**question("anatomy", 1), "choices": ["a"]}, "has 1 choices, not 4"),
        ("gsm8k", "gsm8k/test", {"question": "?", "answer": "4"}, "field 'answer' has no ####"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(
    task: str, file: str, row: dict[str, Any], expected: str, checkpoint: Checkpoint, data: Path, tmp_path: Path
) -> None:
    good = json.loads((data / f"{file}.jsonl").read_text().splitlines()[0])
    write(tmp_path / f"{file}.jsonl", [good, row])
    found = message(task, checkpoint, tmp_path)
    assert found.startswith(f"{tmp_path}/{file}.jsonl, line 2: ") and expected in found


def test_damaged_files_are_named(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    assert f"there is no {tmp_path}/gsm8k/test.jsonl (or test.jsonl.gz)" in message("gsm8k", checkpoint, tmp_path)
    path = tmp_path / "gsm8k" / "test.jsonl"
    write(path, [sum_of(1), [1]])
    assert f"{path}, line 2 is not a JSON object" in message("gsm8k", checkpoint, tmp_path)
    path.write_bytes(b'{"question": "caf\xe9"}\n')
    assert f"{path}, line 1 is not JSON" in message("gsm8k", checkpoint, tmp_path)
    path.write_text("\n{")
    assert f"{path}, line 2 is not JSON" in message("gsm8k", checkpoint, tmp_path)
    whole = gzip.compress(json.dumps(sum_of(1)).encode() + b"\n")
    path.unlink()
    path.with_name("test.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert f"{path}.gz, line 1: the file is damaged or cut short" in message("gsm8k", checkpoint, tmp_path)
    path.with_name("test.jsonl.gz").write_bytes(whole)
    assert list(make("gsm8k", checkpoint, tmp_path).documents()) == [sum_of(1)]
    write(tmp_path / "mmlu/test.jsonl", [question("anatomy", 1)])
    assert "there are no questions about virology" in message("mmlu_virology", checkpoint, tmp_path)


def test_without_local_data_and_network_the_advice_names_the_file(checkpoint: Checkpoint) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"dataset 'openai/gsm8k', split test cannot be had .*DIR/gsm8k/test.jsonl"):
        list(make("gsm8k", checkpoint, None).documents())
