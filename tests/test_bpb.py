"""Evaluator `bpb`: equal to bits per byte worked out by hand, on data folders, shards and text files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from llmkit.checkpoint import Checkpoint
from llmkit.data.tokens import TokenData
from llmkit.engines import open_engine
from llmkit.evaluation import Evaluation
from llmkit.evaluator import EvalContext, Evaluator
from llmkit.testing import EvaluatorContract
from llmkit.testing.tiny import TEXT, tiny_checkpoint, tiny_data
from llmkit.tokenizer import load_tokenizer
from llmkit_bpb import BitsPerByte


class TestContract(EvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> type[Evaluator]:
        return BitsPerByte

    @pytest.fixture
    def options(self, tmp_path: Path) -> Mapping[str, str]:
        return {"data": str(tiny_data(tmp_path / "data").path)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "checkpoint", context=32)


@pytest.fixture
def data(tmp_path: Path) -> TokenData:
    return tiny_data(tmp_path / "data", text=TEXT + "\nnaïve 日本\n" * 12)


def bits_per_byte(checkpoint: Checkpoint, place: Path | str | None = None) -> dict[str, float]:
    evaluation = Evaluation(checkpoint, ["bpb"], options={} if place is None else {"data": str(place)})
    with open_engine(checkpoint, "transformers", dtype="fp32", device="cpu") as engine:
        list(evaluation.run(engine))
    figures: dict[str, float] = evaluation.results()["results"]["bpb"]
    return figures


def by_hand(checkpoint: Checkpoint, documents: list[str]) -> float:
    """One token at a time, each from its own forward pass over a full or growing window."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint.path), checkpoint.tokenizer
    nats = 0.0
    for document in documents:
        ids = tokenizer.encode(document)
        whole = [tokenizer.eot_id, *ids]
        for start in range(0, len(ids), 32):
            end = min(start + 32, len(ids))
            first = max(end - 32, 0) if start else 0
            with torch.no_grad():
                logprobs = model(torch.tensor([whole[first:end]])).logits[0].log_softmax(-1)
            nats -= sum(logprobs[i - first, ids[i]].item() for i in range(start, end))
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


def validation_texts(data: TokenData) -> list[str]:
    ids = [int(token) for shard in data.shards("val") for token in shard]
    texts, start = [], [i for i, token in enumerate(ids) if token == data.eot_id]
    for begin, end in zip(start, [*start[1:], len(ids)]):
        texts.append(data.tokenizer.decode(ids[begin + 1 : end]))
    return texts


def test_it_equals_a_calculation_by_hand(checkpoint: Checkpoint, data: TokenData) -> None:
    figures = bits_per_byte(checkpoint, data.path)
    texts = validation_texts(data)
    assert figures["bpb"] == pytest.approx(by_hand(checkpoint, texts), rel=1e-5)
    assert figures["n"] == len(texts) == data.splits["val"].documents > 1
    assert 0 < figures["bpb_stderr"] < figures["bpb"]


def test_without_data_the_checkpoints_own_is_taken(checkpoint: Checkpoint, data: TokenData) -> None:
    provenance = {"data": {"path": str(data.path), "fingerprint": data.fingerprint}}
    (checkpoint.path / "llmkit.json").write_text(json.dumps(provenance))
    assert bits_per_byte(Checkpoint.open(checkpoint.path)) == bits_per_byte(checkpoint, data.path)


def test_all_forms_of_a_text_give_the_same(checkpoint: Checkpoint, data: TokenData, tmp_path: Path) -> None:
    texts = validation_texts(data)
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    expected = bits_per_byte(checkpoint, data.path)
    assert bits_per_byte(checkpoint, tmp_path / "val.jsonl") == expected
    (shard,) = data.shard_paths("val")
    assert bits_per_byte(checkpoint, shard) == expected
    (tmp_path / "one.txt").write_text(texts[0], "utf-8")
    assert bits_per_byte(checkpoint, tmp_path / "one.txt")["bpb"] == pytest.approx(
        by_hand(checkpoint, texts[:1]), rel=1e-5
    )


def test_data_of_another_tokenizer_is_read_as_text(checkpoint: Checkpoint, tmp_path: Path, test_data: Path) -> None:
    other = load_tokenizer(test_data / "models" / "stories260k-hf")
    theirs, ours = tiny_data(tmp_path / "other", tokenizer=other), tiny_data(tmp_path / "own")
    with_eot = other.eot_id is not None
    assert validation_texts(theirs) == validation_texts(ours) or not with_eot
    assert bits_per_byte(checkpoint, theirs.path)["bpb"] == pytest.approx(bits_per_byte(checkpoint, ours.path)["bpb"])


def test_documents_run_on_into_the_next_shard(checkpoint: Checkpoint, tmp_path: Path) -> None:
    small, large = tiny_data(tmp_path / "small", shard_tokens=100), tiny_data(tmp_path / "large")
    assert len(small.shards("val")) > 1
    assert bits_per_byte(checkpoint, small.path) == bits_per_byte(checkpoint, large.path)


def test_faults_are_one_sentence(checkpoint: Checkpoint, data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        bits_per_byte(checkpoint)
    with pytest.raises(ValueError, match="there is no file, folder or data source"):
        bits_per_byte(checkpoint, tmp_path / "nothing")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="task 'bpb' has no documents"):
        bits_per_byte(checkpoint, tmp_path / "empty.txt")
    shard = data.shard_paths("val")[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="truncated"):
        bits_per_byte(checkpoint, data.path)


def test_a_standard_error_covers_the_spread() -> None:
    task = BitsPerByte.__new__(BitsPerByte)
    equal = task.aggregate([{"bits": 2.0, "bytes": 1.0}, {"bits": 20.0, "bytes": 10.0}])["bpb"]
    assert (equal.value, equal.stderr) == (2.0, 0.0)
    spread = task.aggregate([{"bits": 1.0, "bytes": 1.0}, {"bits": 3.0, "bytes": 1.0}])["bpb"]
    assert (spread.value, spread.stderr) == (2.0, 1.0)  # as the mean's, where all documents have the same size


def test_it_needs_no_engine_to_list_documents(checkpoint: Checkpoint, data: TokenData) -> None:
    task = BitsPerByte(EvalContext(checkpoint, checkpoint.tokenizer, options={"data": str(data.path)}))
    assert [document["text"] for document in task.documents()] == validation_texts(data)
