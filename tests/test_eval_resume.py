"""Runs that are killed, and the answers that are kept: nothing is asked twice, lost, or taken from another model."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import pytest

from llmkit import eval_cache
from llmkit.checkpoint import Checkpoint
from llmkit.cli.main import run
from llmkit.engine import Chunk, Engine, GenerateRequest, Sampling, ScoreRequest, ScoreResult
from llmkit.eval_cache import AnswerCache, file_digest, model_key, score_key, text_key
from llmkit.evaluator import Answer, Likelihood
from llmkit.files import cache_dir
from llmkit.plugins import get_plugins
from llmkit.testing.tiny import tiny_checkpoint

DOCUMENTS = 150


class Slow(Engine):
    """Log-likelihoods out of the token ids alone, one every four milliseconds; writes down what it is asked."""

    name = "slow"
    vocab_size, context_length, eos_ids, dtype = 257, 64, frozenset[int](), "fp32"
    quantizations = ("int8",)
    log: ClassVar[IO[str] | None] = None

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None, quantize: str | None = None
    ) -> Self:
        engine = cls()
        engine.dtype = quantize or dtype or "fp32"
        return engine

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for request in requests:
            if self.log is not None:
                time.sleep(0.004)
                self.log.write("asked\n")
                self.log.flush()
            values = tuple(-math.log(2 + token % 7) for token in request.continuation)
            yield ScoreResult(request.id, values, (False,) * len(values))

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        return iter(())

    def cancel(self, request_id: int) -> None: ...


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(get_plugins()._items, "engine", {**get_plugins()._items["engine"], "slow": Slow})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("eval") / "checkpoint")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMKIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "eval"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = (json.dumps({"text": f"The number {i} comes after {i - 1}."}) + "\n" for i in range(DOCUMENTS))
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path / "text.jsonl"


def command(checkpoint: Checkpoint, data: Path, *args: object) -> list[str]:
    chosen = ["--tasks", "bpb", "--data", str(data), "--engine", "slow", "--json"]
    return ["eval", str(checkpoint.path), *chosen, *map(str, args)]


def start(checkpoint: Checkpoint, data: Path, out: Path, *args: str) -> subprocess.Popen[str]:
    """The command in a process of its own; `asked` beside `out` gets a line for each request."""
    program = [sys.executable, __file__, str(out.with_name("asked")), *command(checkpoint, data, "--out", out, *args)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_goes_on(checkpoint: Checkpoint, data: Path, tmp_path: Path, cache: Path) -> None:
    """Killed at several moments, each time further on; a request is asked again only if its answer had not come out."""
    samples = tmp_path / "r.samples.jsonl"
    kills = (1, 40, 41, 100)
    for moment in kills:
        process = start(checkpoint, data, tmp_path / "r.json")
        while lines(samples) < moment or lines(tmp_path / "asked") < moment:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "r.json").exists()
    with samples.open("a") as file:
        file.write('{"task": "bpb", "doc_id": 7, "do')  # torn in the middle of a line
    process = start(checkpoint, data, tmp_path / "r.json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(sample["doc_id"] for sample in found) == list(range(DOCUMENTS))
    assert json.loads(out)["cached"] >= 100
    assert DOCUMENTS <= lines(tmp_path / "asked") <= DOCUMENTS + len(kills)
    fresh = start(checkpoint, data, tmp_path / "fresh.json", "--no-cache")
    assert json.loads(fresh.communicate()[0])["results"] == json.loads(out)["results"]


def test_two_runs_at_once_share_their_answers(checkpoint: Checkpoint, data: Path, tmp_path: Path, cache: Path) -> None:
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    found = []
    for process in [start(checkpoint, data, out) for out in outs]:
        out, err = process.communicate()
        assert process.returncode == 0, err
        found.append(json.loads(out)["results"])
    assert found[0] == found[1]
    assert len(list(cache.glob("*.sqlite"))) == 1


def evaluate(capsys: pytest.CaptureFixture[str], checkpoint: Checkpoint, data: Path, *args: str) -> dict[str, Any]:
    assert run(command(checkpoint, data, "--limit", "5", *args)) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_only_the_same_model_and_request_is_answered_from_before(
    checkpoint: Checkpoint, data: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(capsys, checkpoint, data)
    assert first["cached"] == 0
    again = evaluate(capsys, checkpoint, data, "--limit", "7")
    assert again["cached"] == 5
    assert evaluate(capsys, checkpoint, data, "--no-cache")["cached"] == 0
    assert evaluate(capsys, checkpoint, data, "--quantize", "int8")["cached"] == 0
    assert evaluate(capsys, checkpoint, data, "--device", "cpu")["cached"] == 0
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    assert evaluate(capsys, Checkpoint.open(copy), data)["cached"] == 5  # the content counts, not the place
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert evaluate(capsys, Checkpoint.open(copy), data)["cached"] == 0


def test_keys_tell_requests_apart() -> None:
    scores = [((1, 2), (3,)), ((1,), (2, 3)), ((1, 2), (4,)), ((2, 1), (3,))]
    assert len({score_key(*pair) for pair in scores}) == len(scores)
    texts = [((1,), (), Sampling()), ((1,), ("a",), Sampling()), ((1,), (), Sampling(seed=1)), ((2,), (), Sampling())]
    assert len({text_key(*text) for text in texts}) == len(texts)


def test_answers_come_back_to_the_bit(tmp_path: Path) -> None:
    answers: list[Answer] = [Likelihood(-0.1 - 1e-17, True, 3), Likelihood(-1e300, False, 0), "é\n\0", ""]
    cache = AnswerCache(tmp_path / "c.sqlite")
    for number, answer in enumerate(answers):
        cache.put(bytes([number]), answer)
    cache.close()
    again = AnswerCache(tmp_path / "c.sqlite")
    assert [again.get(bytes([number])) for number in range(5)] == [*answers, None]
    again.close()


def test_a_damaged_cache_is_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"no database " * 100)
    cache = AnswerCache(tmp_path / "c.sqlite")
    cache.put(b"k", "answer")
    assert cache.get(b"k") == "answer"
    assert "is damaged" in capsys.readouterr().err
    cache.close()


def test_without_a_place_for_answers_the_run_goes_on(
    checkpoint: Checkpoint,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMKIT_CACHE_DIR", str(tmp_path / "file"))
    assert run(command(checkpoint, data, "--limit", 3)) == 0
    assert "answers are not kept" in capsys.readouterr().err


def test_a_full_disk_stops_only_the_keeping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite")
    cache._db.execute("PRAGMA max_page_count = 4")
    for number in range(1000):
        cache.put(number.to_bytes(2, "big"), "a long answer " * 50)
    assert capsys.readouterr().err.count("no more answers are kept") == 1
    assert cache.get((0).to_bytes(2, "big")) is not None
    cache.close()


def test_a_full_disk_loses_no_answers(checkpoint: Checkpoint, data: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "r.samples.jsonl").symlink_to("/dev/full")
    full = start(checkpoint, data, tmp_path / "r.json")
    _, err = full.communicate()
    assert full.returncode == 1
    assert f"{tmp_path}/r.samples.jsonl: No space left on device (the answers so far are kept" in err
    (tmp_path / "r.samples.jsonl").unlink()
    roomy = start(checkpoint, data, tmp_path / "r.json")
    out, err = roomy.communicate()
    assert roomy.returncode == 0, err
    assert json.loads(out)["cached"] >= 1
    assert lines(tmp_path / "r.samples.jsonl") == lines(tmp_path / "asked") == DOCUMENTS


def test_the_oldest_answers_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_cache, "MAX_BYTES", 2500)
    now = time.time()
    for name, days in (("old", 3), ("older", 4), ("recent", 2), ("used", 0), ("kept", 0)):
        (tmp_path / f"{name}.sqlite").write_bytes(b"x" * 1000)
        os.utime(tmp_path / f"{name}.sqlite", (now, now - days * 86_400 - 10))
    os.utime(tmp_path / "used.sqlite")
    os.utime(tmp_path / "kept.sqlite")
    eval_cache._prune(tmp_path / "kept.sqlite")
    assert {path.stem for path in tmp_path.glob("*.sqlite")} == {"used", "kept"}


def test_a_digest_follows_the_content(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    first = file_digest(path)
    assert file_digest(path) == first and len(list((cache_dir() / "digests").iterdir())) == 1
    os.utime(path, ns=(1, 1))
    assert file_digest(path) == first
    path.write_bytes(b"b" * 100)
    assert file_digest(path) != first


def test_the_model_s_key_has_its_engine_and_options(checkpoint: Checkpoint, cache: Path) -> None:
    engine = Slow()
    key = model_key(checkpoint, engine, {"device": None})
    assert model_key(checkpoint, engine, {"device": "cuda"}) != key
    engine.dtype = "bf16"
    assert model_key(checkpoint, engine, {"device": None}) != key


def test_the_file_is_an_ordinary_database(checkpoint: Checkpoint, data: Path, cache: Path) -> None:
    assert run(command(checkpoint, data, "--limit", 3)) == 0
    (path,) = cache.glob("*.sqlite")
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (3,)


if __name__ == "__main__":
    Slow.log = open(sys.argv[1], "a")  # noqa: SIM115 - for as long as the process lives
    get_plugins()._items["engine"]["slow"] = Slow
    sys.exit(run(sys.argv[2:]))
