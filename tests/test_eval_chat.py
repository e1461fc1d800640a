"""Evaluating chat models in their own format, scoring beside generation, and few-shot draws that nothing shifts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.checkpoint import Checkpoint
from llmkit.cli.main import run
from llmkit.engine import Chunk, Engine, GenerateRequest, ScoreRequest, ScoreResult
from llmkit.eval_chat import Chat, Conversation
from llmkit.eval_requests import Encoder
from llmkit.evaldata import draw
from llmkit.evaluation import Evaluation
from llmkit.evaluator import Answer, Document, Evaluator, Generate, LogLikelihood, Prompt, Request, RollingLogLikelihood
from llmkit.plugins import get_plugins
from llmkit.testing.tiny import tiny_checkpoint
from llmkit.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant:{% endif %}"
)
SHOTS = [("1+1=", "2"), ("2+2=", "4")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return chat_model(tmp_path_factory.mktemp("chat") / "checkpoint", TEMPLATE)


def chat_model(path: Path, template: str) -> Checkpoint:
    tiny_checkpoint(path)
    (path / "chat_template.jinja").write_text(template)
    return Checkpoint.open(path)


def test_a_prompt_is_its_text() -> None:
    prompt = Prompt("3+3=", SHOTS, "Sums.\n\n")
    assert prompt == "Sums.\n\n1+1= 2\n\n2+2= 4\n\n3+3="
    assert json.loads(json.dumps({"p": prompt})) == {"p": str(prompt)}
    assert (Prompt("q"), Prompt("q").shots) == ("q", ())


def test_examples_are_one_message_or_turns(model: Checkpoint) -> None:
    prompt = Prompt("3+3=", SHOTS)
    assert Chat(model).render(prompt) == "[user:1+1= 2\n\n2+2= 4\n\n3+3=][assistant:"
    turns = Chat(model, fewshot_as_turns=True).render(prompt)
    assert turns == "[user:1+1=][assistant:2][user:2+2=][assistant:4][user:3+3=][assistant:"
    assert Chat(model).render("plain") == "[user:plain][assistant:"


@pytest.mark.parametrize(
    ("system", "description", "expected"),
    [
        ("Be brief.", "", "Be brief."),
        ("", "Sums.", "Sums."),
        ("A", "B", "A\n\nB"),
        ("A\n", "B", "A\nB"),
        ("A", " B", "A B"),
    ],
)
def test_the_system_message_is_prompt_and_description(
    system: str, description: str, expected: str, model: Checkpoint
) -> None:
    assert Chat(model, system).render(Prompt("q", (), description)) == f"[system:{expected}][user:q][assistant:"


def test_choices_lose_their_space_and_whole_texts_stay(model: Checkpoint) -> None:
    choice, text, whole = Chat(model).requests(
        [LogLikelihood("q", " yes"), Generate("q", ("x",)), RollingLogLikelihood("t")]
    )
    assert choice == LogLikelihood("[user:q][assistant:", "yes")
    assert text == Generate("[user:q][assistant:", ("x",))
    assert whole == RollingLogLikelihood("t")
    assert Chat(model).requests([text]) == [text]  # what is rendered is not rendered again


def test_a_base_model_is_refused(base: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="has no chat template, so it is a base model"):
        Chat(base)
    assert run(["eval", str(base.path), "--tasks", "bpb", "--data", __file__, "--apply-chat-template"]) == 1
    assert "evaluate it without --apply-chat-template" in capsys.readouterr().err
    for flag in (["--system-prompt", "x"], ["--fewshot-as-turns"]):
        assert run(["eval", str(base.path), "--tasks", "bpb", *flag]) == 2
        assert f"{flag[0]} needs --apply-chat-template" in capsys.readouterr().err


def test_a_template_without_system_messages(tmp_path: Path) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    model = chat_model(tmp_path / "model", source)
    with pytest.raises(ValueError, match="takes no system prompt"):
        Chat(model, "Be brief.")
    assert Chat(model).render(Prompt("q", (), "Sums.")) == "[user:q][assistant:"  # as the harness does


def test_special_tokens_of_the_template_count(model: Checkpoint) -> None:
    (special, index), *_ = BYTES.special_tokens.items()
    encoder = Encoder(BYTES, 64)
    pair = encoder.pair(LogLikelihood(Conversation(f"a{special}b"), "c"))
    assert pair.context == (ord("a"), index, ord("b"))
    assert index not in encoder.pair(LogLikelihood(f"a{special}b", "c")).context
    assert index in encoder.prompt(Generate(Conversation(f"a{special}b"), max_tokens=1))[0]


# --- scoring beside generation


class Writer(Engine):
    """Writes the letter that its prompt ends with, one request after the other."""

    name = "writer"
    vocab_size, context_length, eos_ids, dtype = BYTES.vocab_size, 64, frozenset[int](), "fp32"
    written: ClassVar[threading.Event]

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        return cls()

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        return iter(())

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        for request in requests:
            yield Chunk(request.id, request.prompt[-1:], finish_reason="length")
        Writer.written.set()

    def cancel(self, request_id: int) -> None: ...


class Patient(Evaluator):
    """Scores nothing before all answers are written; the first document takes longest."""

    name = "patient"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"acc": True}
    scores_in_threads = True
    first: ClassVar[threading.Event]

    def documents(self) -> Iterable[Document]:
        return [{"prompt": f"say {letter}"} for letter in "abcd"]

    def requests(self, document: Document) -> list[Request]:
        return [Generate(document["prompt"], max_tokens=4)]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        assert Writer.written.wait(30), "generation waited for scoring"
        if answers[0] == "b":
            self.first.set()
        if answers[0] == "a":
            assert self.first.wait(30), "documents are scored one after the other"
        return {"acc": float(answers[0] in ("a", "c"))}


def test_scoring_goes_on_beside_generation(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(get_plugins()._items["evaluator"], "patient", Patient)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    Writer.written, Patient.first = threading.Event(), threading.Event()
    evaluation = Evaluation(base, ["patient"])
    samples = list(evaluation.run(Writer()))
    assert sorted(sample.index for sample in samples) == [0, 1, 2, 3]
    assert {sample.index: sample.scores["acc"] for sample in samples} == {0: 1, 1: 0, 2: 1, 3: 0}
    assert evaluation.results()["results"]["patient"]["acc"] == 0.5


def test_a_fault_in_scoring_is_raised(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Patient):
        def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
            raise ValueError("the sandbox is gone")

    monkeypatch.setitem(get_plugins()._items["evaluator"], "patient", Failing)
    Writer.written = threading.Event()
    with pytest.raises(ValueError, match="the sandbox is gone"):
        list(Evaluation(base, ["patient"]).run(Writer()))


# --- few-shot draws


def write(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def sum_of(i: int) -> dict[str, Any]:
    return {"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    write(folder / "gsm8k/train.jsonl", [sum_of(i) for i in range(30)])
    write(folder / "gsm8k/test.jsonl", [sum_of(i) for i in range(100, 112)])
    return folder


@given(st.permutations(range(12)), st.integers(1, 12))
def test_examples_do_not_depend_on_order_or_limit(sums: Path, base: Checkpoint, order: list[int], limit: int) -> None:
    """Whatever part of the documents, in whatever order (as several processes would have them): the same prompts."""
    task = get_plugins().evaluator("gsm8k")
    evaluation = Evaluation(base, ["gsm8k"], data_dir=sums)
    documents = list(evaluation.tasks["gsm8k"].documents())
    expected = {document["question"]: evaluation.tasks["gsm8k"].requests(document) for document in documents}
    again = task(evaluation.tasks["gsm8k"].context)
    for index in order[:limit]:
        assert again.requests(documents[index]) == expected[documents[index]["question"]]


def test_draws_are_the_same_in_every_process() -> None:
    """Pinned: a draw that changes makes results incomparable with earlier ones."""
    assert draw(list(range(100)), 5, 1234, "a document") == [36, 76, 31, 72, 94]
