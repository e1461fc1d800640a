"""`llmkit chat --url`: our own server, and one that is not ours, with all that can go wrong at it."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmkit_chat.models import Parameters, Part
from llmkit_chat.remote import RemoteModel, base_url

pytest.importorskip("openai")
USER = [{"role": "user", "content": "Hello"}]


class Other(http.server.BaseHTTPRequestHandler):
    """A server of somebody else: it lists models without saying more of them, and does what the message names."""

    requests: list[tuple[str | None, dict[str, Any]]]
    models: tuple[str, ...] = ("theirs",)
    protocol_version = "HTTP/1.0"  # the end of an answer is the end of the connection

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.headers["Authorization"], body))
        said = body["messages"][-1]["content"]
        if said == "refuse":
            return self._json({"error": {"message": "Wrong key.", "type": "x", "param": None, "code": None}}, 401)
        if said == "page":
            return self._json("<html>", 502)
        if len(body["messages"]) > 3:
            message = "This model's maximum context length is 9 tokens. However, you asked for more."
            return self._json(
                {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}, 400
            )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hel"}}]})
        if said == "break":
            return None
        if said == "fail":
            return self._event({"error": {"message": "The engine failed.", "type": "x", "code": None}})
        self._event({"choices": [{"index": 0, "delta": {"content": "lo."}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, value: Any) -> None:
        common = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "theirs"}
        self.wfile.write(f"data: {json.dumps({**common, **value})}\n\n".encode())

    def _json(self, value: Any, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


@pytest.fixture
def other() -> Iterator[str]:
    Other.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def open_model(url: str, **options: Any) -> RemoteModel:
    return RemoteModel(url, **{"model": None, "api_key": None, "completes": None, **options})


def answer(model: RemoteModel, messages: Any, **given: Any) -> list[Part]:
    return list(model.reply(messages, Parameters(given), threading.Event()))


def test_only_what_the_user_gave_is_sent(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a secret for another server")
    model = open_model(other)
    parts = answer(model, USER)
    assert (model.name, model.completes) == ("theirs", False)
    assert "".join(part.text for part in parts) == "Hello."
    assert (parts[-1].tokens, parts[-1].finish_reason) == (2, "stop")
    answer(open_model(other, api_key="sesame"), USER, temperature=0.5, top_k=3)
    (first_key, first), (second_key, second) = Other.requests
    assert "secret" not in str(first_key)
    assert second_key == "Bearer sesame"
    assert set(first) == {"model", "messages", "stream", "stream_options"}
    assert (second["temperature"], second["top_k"]) == (0.5, 3)


def test_what_the_server_finds_too_long_is_left_out(other: str) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    parts = answer(open_model(other), [{"role": "system", "content": "s"}, *turns, *USER])
    assert parts[0].notice == "the conversation no longer fits the model's context: the oldest 4 messages are left out"
    assert [message["content"] for message in Other.requests[-1][1]["messages"]] == ["s", "Hello"]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("refuse", r"Wrong key\.; --api-key-env NAME takes a key from"),
        ("break", "ended the connection in the middle of the answer"),
        ("fail", r"The engine failed\."),
        ("page", "502 Bad Gateway"),
    ],
)
def test_errors_are_one_sentence(other: str, said: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0)
    with pytest.raises(ValueError, match=sentence):
        answer(open_model(other), [{"role": "user", "content": said}])


def test_a_model_must_be_there_and_be_chosen(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="serves no model 'their': did you mean theirs"):
        open_model(other, model="their")
    monkeypatch.setattr(Other, "models", ("one", "two"))
    with pytest.raises(ValueError, match=r"serves 2 models: choose one with --model \(one, two\)"):
        open_model(other)
    assert open_model(other, model="two").name == "two"


def test_an_address_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0)
    with pytest.raises(ValueError, match="cannot reach http"):
        open_model("http://127.0.0.1:9")
    assert base_url("http://host:80/") == "http://host:80/v1"
    assert base_url("https://host/api/v3") == "https://host/api/v3"
    with pytest.raises(ValueError, match="is no address"):
        base_url("localhost:8000")


def test_our_server_says_which_models_are_base_models(base_model: Path, chat_model: Path) -> None:
    command = [sys.executable, "-m", "llmkit", "serve", f"talks={chat_model}", f"writes={base_model}", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(match[0] for line in process.stderr if (match := re.search(r"http://\S+", line)))
            chat, writer = open_model(url, model="talks"), open_model(url, model="writes")
            assert (chat.completes, writer.completes) == (False, True)
            once = [{"role": "user", "content": "Once upon a time"}]
            answered = "".join(part.text for part in answer(chat, once, temperature=0.0, max_tokens=12))
            given = Parameters({"temperature": 0.0, "max_tokens": 12})
            continued = "".join(part.text for part in writer.complete("Once upon a time", given, threading.Event()))
            assert answered == continued
            assert answered.startswith(", there was a little girl")
            long = [{"role": r, "content": "Lily was happy. " * 120} for r in ("user", "assistant")] + once
            parts = answer(chat, long, temperature=0.0, max_tokens=12)
            assert "the oldest 2 messages are left out" in parts[0].notice
            stop = threading.Event()
            running = writer.complete("Once upon a time", Parameters({"max_tokens": 400}), stop)
            next(running)
            stop.set()
            assert list(running) == []
        finally:
            process.terminate()
