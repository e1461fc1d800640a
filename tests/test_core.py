"""`core` and `chatcore`: prompts and scores against a computation of their own, means, and what is missing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.cli.main import run
from llmkit.engines import open_engine
from llmkit.evaluation import Evaluation, Sample
from llmkit.evaluator import EvalContext, Evaluator, TokenLogLikelihood
from llmkit.plugins import get_plugins
from llmkit.testing import EvaluatorContract
from llmkit.testing.tiny import tiny_checkpoint
from llmkit_core.tasks import TASKS

WORDS = ["bread", "water", "stone", "river", "cloud", "winter", "silver", "garden", "letter", "morning"]


def item(kind: str, i: int) -> dict[str, Any]:
    chance = random.Random(i)
    words = chance.sample(WORDS, 4)
    if kind == "choice":
        choices = [f"the {word}" for word in words]  # begin alike, so that the common beginning counts
        return {"query": f"Question {i}: which?", "choices": choices, "gold": chance.randrange(4)}
    if kind == "schema":
        contexts = [f"Because the {word}" for word in words[:2]]
        return {"context_options": contexts, "continuation": "was cold.", "gold": chance.randrange(2)}
    return {"context": f" {words[0]} {words[1]} {words[0]} ", "continuation": chance.choice(["e", "s", words[1]])}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core")
    for spec in TASKS.values():
        path = folder / "core_eval" / f"{spec.file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item(spec.kind, i)) + "\n" for i in range(14)))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", context=1024)


@pytest.mark.parametrize("name", ["core_arc_easy", "core_winograd", "core_jeopardy"])
class TestContract(EvaluatorContract):
    @pytest.fixture
    def evaluator(self, name: str) -> type[Evaluator]:
        return get_plugins().evaluator(name)

    @pytest.fixture
    def data_dir(self, data: Path) -> Path:
        return data


class ByHand:
    """CORE's accuracy worked out from whole sequences of logits, after nanochat's description."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
        self.encode = checkpoint.tokenizer.encode
        assert checkpoint.tokenizer.eot_id is not None
        self.begin = checkpoint.tokenizer.eot_id

    def losses(self, text: str) -> tuple[list[int], list[float], list[int]]:
        """(ids, loss of each id, the model's first choice for each id); the begin token has neither."""
        import torch

        ids = [self.begin, *self.encode(text)]
        with torch.inference_mode():
            logprobs = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses = [-float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))]
        return ids, [math.nan, *losses], [-1, *logprobs.argmax(-1)[:-1].tolist()]

    def right(self, spec: Any, items: Sequence[Mapping[str, Any]], index: int) -> bool:
        target = items[index]
        others = [i for i in range(len(items)) if i != index]
        shots = [items[i] for i in random.Random(1234 + index).sample(others, spec.shots)] if spec.shots else []
        delimiter = spec.delimiter
        if spec.kind == "choice":
            before = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
            rows = [self.losses(f"{before}{target['query']}{delimiter}{choice}") for choice in target["choices"]]
            start = 0
            while len({ids[start] for ids, _, _ in rows}) == 1:
                start += 1
            means = [sum(losses[start:]) / len(losses[start:]) for _, losses, _ in rows]
            return means.index(min(means)) == target["gold"]
        if spec.kind == "schema":
            rows = [
                self.losses(f"{context}{delimiter}{target['continuation']}") for context in target["context_options"]
            ]
            end = 1
            while len({ids[-end] for ids, _, _ in rows}) == 1:
                end += 1
            means = [sum(losses[1 - end :]) / (end - 1) for _, losses, _ in rows]
            return means.index(min(means)) == target["gold"]
        before = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
        bare = before + target["context"].strip() + delimiter
        ids, _, chosen = self.losses(bare + target["continuation"])
        start = 1 + len(self.encode(bare.strip()))
        return ids[start:] == chosen[start:]


def evaluate(checkpoint: Checkpoint, tasks: list[str], data: Path, **options: Any) -> tuple[list[Sample], Any]:
    evaluation = Evaluation(checkpoint, tasks, data_dir=data, **options)
    with open_engine(checkpoint, "llmkit", dtype="fp32") as engine:
        samples = list(evaluation.run(engine))
    return samples, evaluation.results()


@pytest.mark.parametrize(
    "name", ["core_hellaswag_zeroshot", "core_arc_easy", "core_winograd", "core_lambada_openai", "core_jeopardy"]
)
def test_answers_are_those_worked_out_by_hand(name: str, checkpoint: Checkpoint, data: Path) -> None:
    pytest.importorskip("transformers")
    spec, hand = TASKS[name], ByHand(checkpoint)
    items = [item(spec.kind, i) for i in range(14)]
    random.Random(1337).shuffle(items)
    expected = [hand.right(spec, items, index) for index in range(14)]
    samples, results = evaluate(checkpoint, [name], data)
    assert [bool(s.scores["acc"]) for s in sorted(samples, key=lambda s: s.index)] == expected
    accuracy = sum(expected) / 14
    assert results["results"][name]["acc"] == pytest.approx(accuracy)
    assert results["results"][name]["centered"] == pytest.approx((accuracy - spec.guessing) / (1 - spec.guessing))


def test_a_continuation_counts_when_every_token_is_the_first_choice(test_data: Path, tmp_path: Path) -> None:
    stories = Checkpoint.open(test_data / "models" / "stories260k-hf")
    known = [  # how the model goes on
        ("Once upon a", "time"),
        ("Once upon a time, there was a little girl named ", "Lily. She"),
        ("They lived happily ever", "after"),
        ("She was very happy and thanked", "her mommy."),
        ("One day, a little boy", "named Tim"),
    ]
    rows = [{"context": context, "continuation": right} for context, right in known]
    rows += [{"context": context, "continuation": right[:-1] + "x"} for context, right in known]
    path = tmp_path / "core_eval/language_understanding/lambada_openai.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, results = evaluate(stories, ["core_lambada_openai"], tmp_path)
    assert results["results"]["core_lambada_openai"]["acc"] == 0.5


def test_a_limit_changes_no_prompt(checkpoint: Checkpoint, data: Path) -> None:
    few, _ = evaluate(checkpoint, ["core_arc_easy"], data, limit=2)
    everything, _ = evaluate(checkpoint, ["core_arc_easy"], data)
    by_index = {sample.index: sample for sample in everything}
    assert len(few) == 2 and all(sample.requests == by_index[sample.index].requests for sample in few)


def test_an_option_that_begins_another_still_has_a_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "core_eval/commonsense_reasoning/copa.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"query": "q", "choices": ["on", "on it"], "gold": 1}))
    task = get_plugins().evaluator("core_copa")(EvalContext(checkpoint, checkpoint.tokenizer, tmp_path))
    (document,) = task.documents()
    asked = [r for r in task.requests(document) if isinstance(r, TokenLogLikelihood)]
    assert [checkpoint.tokenizer.decode(r.continuation) for r in asked] == ["n", "n it"]


def test_core_is_the_plain_mean_of_centred_figures(checkpoint: Checkpoint, data: Path) -> None:
    _, results = evaluate(checkpoint, ["core"], data, limit=3)
    figures = results["results"]
    assert set(figures) == {"core", *TASKS} and not results["missing"]
    assert figures["core"]["core"] == pytest.approx(sum(figures[name]["centered"] for name in TASKS) / 22)
    squares = math.fsum(figures[name]["centered_stderr"] ** 2 for name in TASKS)
    assert figures["core"]["core_stderr"] == pytest.approx(math.sqrt(squares) / 22)
    assert figures["core"]["n"] == 3 * 22


def test_core_without_some_data_is_called_partial(
    checkpoint: Checkpoint, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data / "core_eval/commonsense_reasoning/copa.jsonl"
    target = tmp_path / "eval_bundle/eval_data/commonsense_reasoning/copa.jsonl"  # as nanochat's archive unpacks
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes())
    args = [str(checkpoint.path), "--tasks", "core", "--data-dir", str(tmp_path), "--no-cache"]
    assert run(["eval", *args, "--json"]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert set(results["results"]) == {"core_copa", "core"}
    assert set(results["results"]["core"]) == {"core_partial", "core_partial_stderr", "n"}
    assert len(results["missing"]["core"]) == 21 and "core_squad" in results["missing"]["core"]
    assert "core is partial, without core_hellaswag_zeroshot, core_jeopardy," in printed.err
    assert run(["eval", *args]) == 0
    assert "core_partial" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reads nanochat's eval_bundle: unpack it and name its folder with --data-dir"),
        ({"data_dir": Path("/nonexistent")}, "task 'core' has no data: there is no language_understanding/hellaswag"),
        ({"num_fewshot": 2}, "leave --num-fewshot out"),
    ],
)
def test_core_refuses_what_would_not_be_core(options: dict[str, Any], message: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(checkpoint, ["core"], **options)


def test_a_bad_item_is_named_with_file_and_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "core_eval/commonsense_reasoning/copa.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(item("choice", 1)) + "\n" + json.dumps({"query": "q", "choices": ["a"], "gold": 1}))
    with pytest.raises(ValueError, match=r"copa\.jsonl, line 2: the right answer is number 1, and there are 1 choices"):
        Evaluation(checkpoint, ["core_copa"], data_dir=tmp_path)


def test_chatcore_is_the_mean_of_what_there_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    arc = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    for level, rows in (("easy", [arc] * 3), ("challenge", [arc, {**arc, "answerKey": "B"}])):
        path = tmp_path / "arc" / level / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""}
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl").write_text(json.dumps({**program, "test": "def check(f):\n    f()\n"}))
    samples, results = evaluate(checkpoint, ["chatcore"], tmp_path, num_fewshot=0, options={"unsafe_execute": "yes"})
    figures = results["results"]
    centred = [(figures[task]["acc"] - 0.25) / 0.75 for task in ("arc_easy", "arc_challenge")]
    assert figures["chatcore"]["chatcore_partial"] == pytest.approx((sum(centred) + figures["humaneval"]["pass@1"]) / 3)
    assert set(results["missing"]["chatcore"]) == {"mmlu", "gsm8k"}
    assert len(samples) == 6
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "?"}')
    with pytest.raises(ValueError, match=r"gsm8k/test\.jsonl, line 1"):  # damaged is not missing
        Evaluation(checkpoint, ["chatcore"], data_dir=tmp_path, num_fewshot=0, options={"unsafe_execute": "yes"})
