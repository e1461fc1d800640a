"""Engine `openai`: the contract of engines against a small endpoint of our own, llmkit's server, and bad endpoints."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="openai is not installed")

from llmkit.checkpoint import Checkpoint
from llmkit.cli.main import run
from llmkit.engine import Engine, GenerateRequest, Sampling, ScoreRequest
from llmkit.engines import open_engine
from llmkit.evaluation import Evaluation
from llmkit.evaluator import Likelihood
from llmkit.generation import Detokenizer, TextRequest, complete
from llmkit.testing import EngineContract
from llmkit.testing.tiny import tiny_checkpoint
from llmkit_openai.engine import OpenAIEngine
from llmkit_openai.protocol import EndpointError

SAMPLING = {"top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"}
FIELDS = SAMPLING | {"temperature", "max_tokens", "min_tokens", "ignore_eos"}


class Endpoint(BaseHTTPRequestHandler):
    """/v1/models and /v1/completions over an engine, with tokens as ids as vLLM writes them, or as text."""

    engine: Engine
    checkpoint: Checkpoint
    models = ("tiny",)
    writes_ids = True
    echoes = True
    failures = 0  # how many requests are answered by 503 first
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Bearer wrong":
            self.answer({"error": {"message": "bad key"}}, 401)
            return
        listed = [{"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in self.models]
        self.answer({"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).failures:
            type(self).failures -= 1
            self.answer({"error": {"message": "busy"}}, 503)
        elif body.get("stream"):
            self.stream(body)
        else:
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            self.answer({"id": "1", "object": "text_completion", "created": 1, "model": "tiny",
                         "choices": [self.echo(i, ids) for i, ids in enumerate(prompts)][::-1]})  # fmt: skip

    def echo(self, index: int, ids: list[int]) -> dict[str, Any]:
        """A prompt with the log-probabilities of its tokens, and one token of an answer."""
        logprobs: list[float | None] = [None]
        top: list[dict[str, float] | None] = [None]
        with self.lock:
            (result,) = self.engine.score([ScoreRequest(0, tuple(ids[:1]), tuple(ids[1:]))])
        for value, greedy in zip(result.logprobs, result.greedy):
            logprobs.append(value)
            top.append({"its own": value} if greedy else {"a better one": value + 1, "its own": value})
        given = {"tokens": ["?"] * len(ids) + ["!"], "token_logprobs": [*logprobs, -1.0], "top_logprobs": [*top, {}]}
        return {"index": index, "text": "", "finish_reason": "length", "logprobs": given if self.echoes else None}

    def stream(self, body: dict[str, Any]) -> None:
        sampling = Sampling(
            **{name: value for name, value in body.items() if name in FIELDS},
            logit_bias={int(token): value for token, value in body.get("logit_bias", {}).items()},
            stop_token_ids=tuple(body.get("stop_token_ids", ())),
            logprobs=body["logprobs"],
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        with self.lock:
            chunks = list(self.engine.generate([GenerateRequest(0, tuple(body["prompt"]), sampling)]))
        detokenizer = Detokenizer(self.checkpoint.tokenizer, body["prompt"])
        for chunk in chunks:
            names = [f"token_id:{token}" if self.writes_ids else "?" for token in chunk.tokens]
            top = [{f"token_id:{token}": p for token, p in best.items()} for best in chunk.top_logprobs]
            given = {"tokens": names, "token_logprobs": list(chunk.logprobs), "top_logprobs": top}
            text = detokenizer.add(chunk.tokens)
            choice = {"index": 0, "text": text, "logprobs": given, "finish_reason": chunk.finish_reason}
            try:
                self.wfile.write(f"data: {json.dumps({'id': '1', 'choices': [choice]})}\n\n".encode())
                self.wfile.flush()
            except OSError:  # the client wants no more
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving(checkpoint: Checkpoint, **settings: Any) -> Iterator[tuple[str, type[Endpoint]]]:
    with open_engine(checkpoint, "transformers", dtype="fp32") as engine:
        handler = type("Handler", (Endpoint,), {"engine": engine, "checkpoint": checkpoint, **settings})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/v1", handler
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("openai") / "checkpoint", context=64)


@pytest.fixture(scope="module")
def tiny_url(tiny: Checkpoint) -> Iterator[str]:
    with serving(tiny) as (url, _):
        yield url


class TestContract(EngineContract):
    @pytest.fixture
    def engine_class(self) -> type[Engine]:
        return OpenAIEngine

    @pytest.fixture
    def checkpoint(self, tiny: Checkpoint) -> Checkpoint:  # type: ignore[override]
        return tiny

    @pytest.fixture
    def engine(self, engine_class: type[Engine], checkpoint: Checkpoint, tiny_url: str) -> Iterator[Engine]:  # type: ignore[override]
        with OpenAIEngine.open(checkpoint, url=tiny_url) as engine:
            yield engine


def text_of(engine: Engine, checkpoint: Checkpoint, prompt: str, stop: tuple[str, ...] = ()) -> str:
    ids = tuple(checkpoint.tokenizer.encode_prompt(prompt))
    (done,) = complete(
        engine, checkpoint.tokenizer, [TextRequest(0, ids, Sampling(temperature=0, max_tokens=24), stop)]
    )
    return done.text


@pytest.mark.parametrize("writes_ids", [True, False])
def test_text_is_the_model_s_whether_the_endpoint_writes_ids_or_not(writes_ids: bool, test_data: Path) -> None:
    stories = Checkpoint.open(test_data / "models" / "stories260k-hf")
    with (
        open_engine(stories, "transformers", dtype="fp32") as direct,
        serving(stories, writes_ids=writes_ids) as (url, _),
        OpenAIEngine.open(stories, url=url) as engine,
    ):
        for stop in ((), (".",)):
            expected = text_of(direct, stories, "Once upon a time", stop)
            assert text_of(engine, stories, "Once upon a time", stop) == expected and len(expected) > 20


def test_llmkit_s_own_server_is_such_an_endpoint(test_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from llmkit_http.options import HttpOptions
    from llmkit_http.server import HttpServer

    stories = Checkpoint.open(test_data / "models" / "stories260k-hf")
    rows = [{"question": "What is it?", "choices": {"text": ["a dog", "a big red ball", "x"], "label": list("ABC")},
             "answerKey": "B"}, {"question": "Where?", "choices": {"text": ["home", "z"], "label": list("AB")},
             "answerKey": "B"}]  # fmt: skip
    (tmp_path / "arc/easy").mkdir(parents=True)
    (tmp_path / "arc/easy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answers(engine: Engine) -> list[Any]:
        samples = list(Evaluation(stories, ["arc_easy"], data_dir=tmp_path).run(engine))
        return [
            (round(answer.logprob, 3), answer.is_greedy, answer.tokens)
            for sample in sorted(samples, key=lambda sample: sample.index)
            for answer in sample.answers
            if isinstance(answer, Likelihood)
        ]

    with open_engine(stories, "transformers", dtype="fp32") as direct:
        expected, text = answers(direct), text_of(direct, stories, "Once upon a time", (".",))
    urls: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    server = threading.Thread(
        target=lambda: HttpServer().serve({"stories": stories}, HttpOptions(port=0), ready=urls.put, stop=stop)
    )
    server.start()
    try:
        with OpenAIEngine.open(stories, url=f"{urls.get(timeout=300)}/v1") as engine:
            assert answers(engine) == expected
            assert text_of(engine, stories, "Once upon a time", (".",)) == text
    finally:
        stop.set()
        server.join()


def test_the_command_line_reaches_an_endpoint(
    tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("two and two make four")
    args = ["eval", str(tiny.path), "--tasks", "bpb", "--data", str(tmp_path / "text.txt"), "--no-cache", "--json"]
    with serving(tiny, models=("a", "tiny")) as (url, _):
        assert run([*args, "--engine", "openai", "--engine-url", url, "--engine-model", "tiny"]) == 0
        remote = json.loads(capsys.readouterr().out)
        assert run([*args, "--engine", "openai", "--engine-url", url]) == 1
        assert f"{url} serves 2 models: choose one with --engine-model (a, tiny)" in capsys.readouterr().err
        assert run([*args, "--engine", "openai", "--engine-url", url, "--engine-model", "b"]) == 1
        assert "serves no model 'b': it has a, tiny" in capsys.readouterr().err
    assert remote["config"]["engine"] == "openai" and remote["config"]["dtype"] == "remote"
    assert run([*args, "--engine", "transformers"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert remote["results"]["bpb"]["bpb"] == pytest.approx(here["results"]["bpb"]["bpb"], abs=1e-4)
    assert run([*args, "--engine", "transformers", "--engine-url", "http://x"]) == 1
    assert "engine 'transformers' runs here" in capsys.readouterr().err


def test_what_fails_for_a_moment_is_repeated(tiny: Checkpoint) -> None:
    request = ScoreRequest(0, (1, 2), (3,))
    with serving(tiny, failures=0) as (url, handler), OpenAIEngine.open(tiny, url=url) as engine:
        expected = list(engine.score([request]))
        handler.failures = 2
        assert list(engine.score([request])) == expected
        assert handler.failures == 0


def test_an_endpoint_without_logprobs_still_generates(tiny: Checkpoint) -> None:
    with serving(tiny, echoes=False) as (url, _), OpenAIEngine.open(tiny, url=url) as engine:
        with pytest.raises(EndpointError, match=r"no log-probabilities of a prompt .* tasks that generate work"):
            list(engine.score([ScoreRequest(0, (1, 2), (3,))]))
        sampling = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
        tokens = [t for chunk in engine.generate([GenerateRequest(0, (1, 2), sampling)]) for t in chunk.tokens]
        assert len(tokens) == 4


def test_endpoints_that_cannot_be_had(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="needs the endpoint's address: --engine-url"):
        OpenAIEngine.open(tiny)
    with pytest.raises(EndpointError, match=r"models of http://127.0.0.1:9/v1 cannot be listed: no connection"):
        OpenAIEngine.open(tiny, url="http://127.0.0.1:9/v1")
    with serving(tiny) as (url, _):
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        with pytest.raises(EndpointError, match="it wants a key in the environment variable OPENAI_API_KEY"):
            OpenAIEngine.open(tiny, url=url)
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with OpenAIEngine.open(tiny) as engine:
            assert engine.context_length == 62
        with pytest.raises(ValueError, match="dtype and device are the endpoint's affair"):
            OpenAIEngine.open(tiny, dtype="bf16")
