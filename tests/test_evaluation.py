"""The evaluation runner: lm-eval's token rules, identical requests once, waves, limits, and results in its schema."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import evaluation
from llmkit.checkpoint import Checkpoint
from llmkit.component import MissingRequirement
from llmkit.engine import Chunk, Engine, GenerateRequest, ScoreRequest, ScoreResult
from llmkit.eval_requests import Encoder
from llmkit.evaluation import Evaluation, Sample
from llmkit.evaluator import (
    Answer,
    Document,
    Evaluator,
    Generate,
    Likelihood,
    LogLikelihood,
    Metric,
    Request,
    RollingLogLikelihood,
    mean,
)
from llmkit.plugins import UnknownComponent, get_plugins
from llmkit.testing.tiny import tiny_checkpoint
from llmkit.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")


class Counting(Engine):
    """Log-likelihood of a token: minus its id / 100, less its number in the context / 10,000. Generates `abc`."""

    name = "counting"
    vocab_size, context_length, eos_ids, dtype = BYTES.vocab_size, 64, frozenset[int](), "fp32"

    def __init__(self) -> None:
        self.scored: list[ScoreRequest] = []
        self.generated: list[GenerateRequest] = []

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        return cls()

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        wave = list(requests)
        self.scored += wave
        for request in reversed(wave):
            self.check(request)
            places = range(len(request.context), len(request.context) + len(request.continuation))
            values = tuple(-t / 100 - place / 1e4 for t, place in zip(request.continuation, places))
            yield ScoreResult(request.id, values, tuple(t == ord("x") for t in request.continuation))

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        wave = list(requests)
        self.generated += wave
        for request in reversed(wave):
            self.check(request)
            yield Chunk(request.id, tuple(BYTES.encode("abc")), finish_reason="length")

    def cancel(self, request_id: int) -> None: ...


class Choice(Evaluator):
    """Two choices a document; the shorter one wins."""

    name = "choice"
    version = "3"
    num_fewshot = 2
    higher_is_better: ClassVar[Mapping[str, bool]] = {"acc": True}
    count = 10

    def documents(self) -> Iterable[Document]:
        return [{"question": f"q{i % 5}", "right": i % 2} for i in range(self.count)]

    def requests(self, document: Document) -> list[Request]:
        return [LogLikelihood(document["question"], choice) for choice in (" x", " xx")]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        assert all(isinstance(answer, Likelihood) for answer in answers)
        best = max(range(2), key=lambda i: answers[i].logprob)  # type: ignore[union-attr]
        return {"acc": float(best == document["right"])}


class Writing(Evaluator):
    """One sampled and one greedy answer, and a document that asks nothing at the end."""

    name = "writing"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"length": False}

    def documents(self) -> Iterator[Document]:
        yield from ({"prompt": f"say {i}"} for i in range(4))
        yield {}

    def requests(self, document: Document) -> list[Request]:
        if not document:
            return []
        prompt = document["prompt"]
        return [Generate(prompt, ("c",), temperature=1.0, max_tokens=8), Generate("same", max_tokens=8)]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        assert list(answers) == (["ab", "abc"] if document else [])
        return {"length": float(sum(len(str(answer)) for answer in answers))}


class Needy(Choice):
    name = "needy"
    requires = ("a_module_that_nobody_has",)


class Empty(Choice):
    name = "empty"
    count = 0


class Broken(Choice):
    name = "broken"

    def requests(self, document: Document) -> list[Request]:
        return [LogLikelihood("a", "")]

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
        return {"acc": Metric(math.nan)}


class Nan(Broken):
    name = "nan"

    def requests(self, document: Document) -> list[Request]:
        return Choice.requests(self, document)


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {cls.name: cls for cls in (Choice, Writing, Needy, Empty, Broken, Nan)}
    monkeypatch.setitem(get_plugins()._items, "evaluator", {**get_plugins()._items["evaluator"], **classes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("eval") / "checkpoint")


def run(evaluation: Evaluation, engine: Engine | None = None) -> list[Sample]:
    return list(evaluation.run(engine or Counting()))


def test_results_have_lm_evals_schema(checkpoint: Checkpoint) -> None:
    evaluation = Evaluation(checkpoint, ["choice", "writing"], seed=7)
    run(evaluation)
    results = evaluation.results()
    assert results["results"]["choice"] == {"acc": 0.5, "acc_stderr": pytest.approx(math.sqrt(0.25 / 9)), "n": 10}
    assert results["results"]["writing"]["length"] == 4.0
    assert results["versions"] == {"choice": "3", "writing": "1"}
    assert results["n-shot"] == {"choice": 2, "writing": 0}
    assert results["higher_is_better"] == {"choice": {"acc": True}, "writing": {"length": False}}
    config = results["config"]
    assert config.items() >= {"engine": "counting", "dtype": "fp32", "seed": 7, "limit": None}.items()
    assert config["checkpoint"] == str(checkpoint.path)


def test_identical_requests_are_computed_once(checkpoint: Checkpoint) -> None:
    engine = Counting()
    run(Evaluation(checkpoint, ["choice", "writing"]), engine)
    assert len(engine.scored) == 10  # of 20: five questions, two choices
    assert len(engine.generated) == 5  # four sampled, and the greedy one that all documents share


def test_samples_come_with_what_was_asked_and_answered(checkpoint: Checkpoint) -> None:
    samples = run(Evaluation(checkpoint, ["choice"], limit=3))
    assert sorted(sample.index for sample in samples) == [0, 1, 2]
    line = next(sample for sample in samples if sample.index == 1).to_json()
    assert line["doc"] == {"question": "q1", "right": 1}
    assert line["arguments"][0] == {"context": "q1", "continuation": " x"}
    assert line["resps"][0] == {"logprob": pytest.approx(-1.5205), "is_greedy": False, "tokens": 2}
    assert line["scores"] == {"acc": 0.0}


@pytest.mark.parametrize("limit", [1, 4, 99])
def test_a_limit_takes_the_first_documents(checkpoint: Checkpoint, limit: int) -> None:
    evaluation = Evaluation(checkpoint, ["choice"], limit=limit)
    assert evaluation.total == min(limit, 10)
    assert len(run(evaluation)) == min(limit, 10)


def test_small_waves_change_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Evaluation(checkpoint, ["choice", "writing"])
    run(whole)
    for name in ("WAVE_TOKENS", "WAVE_DOCUMENTS"):
        monkeypatch.setattr(evaluation, name, 3)
        waves = Evaluation(checkpoint, ["choice", "writing"])
        run(waves)
        assert waves.results()["results"] == whole.results()["results"]


def test_seeds_of_sampled_answers_depend_on_the_document_alone(checkpoint: Checkpoint) -> None:
    def seeds(tasks: list[str], **options: Any) -> dict[tuple[int, ...], int | None]:
        engine = Counting()
        run(Evaluation(checkpoint, tasks, **options), engine)
        return {r.prompt: r.sampling.seed for r in engine.generated if r.sampling.temperature > 0}

    alone = seeds(["writing"])
    assert len(set(alone.values())) == 4
    assert seeds(["choice", "writing"], limit=2).items() <= alone.items()
    assert seeds(["writing"], seed=5) != alone


def test_num_fewshot_reaches_the_task(checkpoint: Checkpoint) -> None:
    assert Evaluation(checkpoint, ["choice"], num_fewshot=0).tasks["choice"].shots == 0


def test_running_metrics_cover_finished_documents(checkpoint: Checkpoint) -> None:
    evaluation = Evaluation(checkpoint, ["choice"])
    assert evaluation.running("choice") == {}
    next(evaluation.run(Counting()))
    assert set(evaluation.running("choice")) == {"acc"}


def test_faults_are_one_sentence(checkpoint: Checkpoint) -> None:
    with pytest.raises(UnknownComponent, match="unknown task 'choise': did you mean choice"):
        Evaluation(checkpoint, ["choise"])
    with pytest.raises(MissingRequirement, match="task 'needy' needs a_module_that_nobody_has: pip install"):
        Evaluation(checkpoint, ["needy"])
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Evaluation(checkpoint, ["choice"], limit=0)
    with pytest.raises(ValueError, match="task 'broken', document 0: the continuation '' has no tokens"):
        run(Evaluation(checkpoint, ["broken"]))
    empty, nan = Evaluation(checkpoint, ["empty"]), Evaluation(checkpoint, ["nan"])
    run(empty), run(nan)
    with pytest.raises(ValueError, match="task 'empty' has no documents"):
        empty.results()
    with pytest.raises(ValueError, match="task 'nan': acc is nan"):
        nan.results()


# --- token rules


def test_trailing_spaces_move_to_the_continuation() -> None:
    encoder = Encoder(BYTES, 64)
    pair = encoder.pair(LogLikelihood("Question \n", "yes"))
    assert (BYTES.decode(pair.context), BYTES.decode(pair.continuation)) == ("Question", " \nyes")


def test_an_empty_context_becomes_the_begin_token() -> None:
    encoder = Encoder(BYTES, 64)
    for context in ("", "  "):
        pair = encoder.pair(LogLikelihood(context, "yes"))
        assert pair.context == (BYTES.eot_id,)
        assert BYTES.decode(pair.continuation) == context + "yes"


def test_the_continuation_is_what_encoding_both_adds(test_data: Path) -> None:
    tokenizer = load_tokenizer(test_data / "models" / "stories260k-hf")
    encoder = Encoder(tokenizer, 512)
    for context, continuation in (("Once upon", " a time"), ("Once up", "on a time"), ("The cat ", "sat")):
        pair = encoder.pair(LogLikelihood(context, continuation))
        alone = tokenizer.encode_prompt(context.rstrip())
        assert pair.context == tuple(alone)
        assert pair.continuation == tuple(tokenizer.encode_prompt(context + continuation)[len(alone) :])


def test_what_is_too_long_loses_its_left_end() -> None:
    encoder = Encoder(BYTES, 8)
    pair = encoder.pair(LogLikelihood("abcdefghij", "xyz"))
    assert (BYTES.decode(pair.context), BYTES.decode(pair.continuation)) == ("efghij", "xyz")
    assert pair.truncated
    assert not encoder.pair(LogLikelihood("abcdef", "xyz")).truncated
    longer = encoder.pair(LogLikelihood("ab", "0123456789"))
    assert (BYTES.decode(longer.context), BYTES.decode(longer.continuation)) == ("1", "23456789")
    assert BYTES.decode(encoder.prompt(Generate("abcdefghij", max_tokens=3))[0]) == "fghij"
    assert BYTES.decode(encoder.prompt(Generate("abcdefghij", max_tokens=300))[0]) == "ghij"
    assert encoder.prompt(Generate("abcde", max_tokens=3)) == (tuple(BYTES.encode("abcde")), False)
    assert encoder.prompt(Generate(""))[0] == (BYTES.eot_id,)


def test_truncated_documents_are_counted(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "context_length", 3)
    evaluation = Evaluation(checkpoint, ["choice"])
    run(evaluation)
    assert evaluation.results()["truncated"] == {"choice": 10}  # two characters and three do not fit


@given(st.integers(0, 60), st.integers(1, 12))
@settings(deadline=None)
def test_windows_are_lm_evals(length: int, context: int) -> None:
    """Token by token: block i // context is predicted at once, from as many tokens as the model can be fed."""
    text = "".join(chr(ord("0") + i) for i in range(length))
    ids = BYTES.encode(text)
    assert BYTES.eot_id is not None
    padded = [BYTES.eot_id, *ids]  # token i is padded[i + 1]
    seen = []
    for window in Encoder(BYTES, context).windows(text):
        for place, token in enumerate(window.continuation):
            seen.append((token, list(window.context + window.continuation[:place])))
    expected = []
    for i, token in enumerate(ids):
        end = min((i // context + 1) * context, length)
        first = max(end - context, 0) if i >= context else 0
        expected.append((token, padded[first : i + 1]))
    assert seen == expected


def test_a_rolling_log_likelihood_sums_its_windows(checkpoint: Checkpoint) -> None:
    class Rolling(Choice):
        name = "choice"

        def requests(self, document: Document) -> list[Request]:
            return [RollingLogLikelihood("x" * 100), RollingLogLikelihood("")]

        def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
            whole, empty = answers
            assert isinstance(whole, Likelihood)
            assert (whole.tokens, whole.is_greedy) == (100, True)
            assert empty == Likelihood(0.0, True, 0)
            places = [*range(1, 65), *range(29, 65)]  # the second window is moved left to be full
            assert whole.logprob == pytest.approx(sum(-ord("x") / 100 - place / 1e4 for place in places))
            return {"acc": 1.0}

    get_plugins()._items["evaluator"]["choice"] = Rolling
    run(Evaluation(checkpoint, ["choice"], limit=1))


def test_the_mean_has_its_standard_error() -> None:
    assert mean([1.0]) == Metric(1.0, None)
    assert mean([0.0, 1.0, 1.0]).stderr == pytest.approx(math.sqrt((1 / 3) / 3))


def test_the_example_in_the_documentation_runs(checkpoint: Checkpoint) -> None:
    text = (Path(__file__).parents[1] / "docs" / "eval.md").read_text("utf-8")
    (code,) = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    names: dict[str, Any] = {}
    exec(code, names)
    get_plugins()._items["evaluator"]["capitals"] = names["Capitals"]
    evaluation = Evaluation(checkpoint, ["capitals"])
    run(evaluation)
    assert evaluation.results()["results"]["capitals"]["n"] == 2
