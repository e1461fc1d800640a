"""The middleware around vLLM's server: error envelopes, keys, limits, as the embedded server has them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmkit_http.page import PAGE_HEADERS, STATIC
from llmkit_vllm.inside.errors import normalise
from llmkit_vllm.inside.middleware import Envelope

MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model"}, {"id": "org/gpt", "object": "model"}]}

#: what vLLM 0.32 answers: (status, body) -> (status, param, code, part of the message)
VLLM_ERRORS = [
    (404, {"detail": "Not Found"}, (404, None, None, "Unknown path: POST /v1/completions")),
    (405, {"detail": "Method Not Allowed"}, (405, None, None, "does not take POST")),
    (
        404,
        {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}},
        (404, "model", "model_not_found", "The model `x` does not exist."),
    ),
    (
        400,
        {"error": {"message": "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
                   "type": "BadRequestError", "param": "temperature", "code": 400}},
        (400, "temperature", None, "temperature must be non-negative, got -1.0."),
    ),
    (
        400,
        {"error": {"message": "1 validation error:\n  {'type': 'float_parsing', 'loc': 'body.temperature', 'msg': "
                   "'Input should be a valid number, unable to parse string as a number', 'input': 'x'}",
                   "type": "Bad Request", "param": "body.temperature", "code": 400}},
        (400, "temperature", None, "temperature: Input should be a valid number"),
    ),
    (
        400,
        {"error": {"message": "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1', 'msg': 'JSON decode "
                   "error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting property name'}}",
                   "type": "Bad Request", "param": "body.1", "code": 400}},
        (400, None, None, "The body is not JSON: Expecting property name"),
    ),
    (
        400,
        {"error": {"message": "This model's maximum context length is 64 tokens. However, your prompt contains at "
                   "least 65 input tokens. (parameter=input_tokens, value=65)", "type": "BadRequestError",
                   "param": "input_tokens", "code": 400}},
        (400, "prompt", "context_length_exceeded", "This model's maximum context length is 64 tokens. However, "),
    ),
    (401, {"error": "Unauthorized"}, (401, None, None, "Unauthorized")),
    (
        500,
        {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None,
                   "code": 500}},
        (500, None, None, "EngineCore encountered an issue."),
    ),
]  # fmt: skip


async def vllm(scope: Any, receive: Any, send: Any) -> None:
    """A server that answers what its path says, in vLLM's way of sending it."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    path = scope["path"]
    if path == "/v1/raise":
        raise RuntimeError("a secret of the server")
    if path.startswith("/v1/stream"):
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
            }
        )
        await send({"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True})
        if path == "/v1/stream/raise":
            raise RuntimeError("a secret of the server")
        error = (
            b'data: {"error": {"message": "it broke", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
        )
        await send({"type": "http.response.body", "body": error, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        return
    status, value = 200, MODELS if path == "/v1/models" else {"echo": body.decode()}
    if path == "/v1/busy":
        status, value = 503, {"detail": "Service Unavailable"}
    if path == "/health":
        status, value = 503, {}
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    text = json.dumps(value).encode()
    await send({"type": "http.response.body", "body": text[:5], "more_body": True})
    await send({"type": "http.response.body", "body": text[5:], "more_body": False})


class Client:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setenv("LLMKIT_INSIDE", json.dumps(settings))
        self.app = Envelope(vllm)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[bytes, bytes]]:
        """Status, body and headers of the answer; the body of the request comes in two parts."""
        parts = [body[: len(body) // 2], body[len(body) // 2 :]]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "headers": pairs}
        asyncio.run(self.app(scope, receive, send))
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) == 1 and sent[0] is starts[0]
        assert not sent[-1].get("more_body")
        return starts[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), dict(starts[0]["headers"])

    def error(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        status, body, headers = self.ask(*args, **kwargs)
        assert headers[b"content-length"] == str(len(body)).encode()
        error: dict[str, Any] = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return status, error


@pytest.mark.parametrize(("status", "body", "expected"), VLLM_ERRORS)
def test_every_form_of_vllms_errors_becomes_the_envelope(status, body, expected):
    error = normalise(status, json.dumps(body).encode(), method="POST", path="/v1/completions")["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == expected[1:3]
    assert str(error["message"]).startswith(expected[3]) or expected[3] in str(error["message"])
    assert "parameter=" not in str(error["message"]) and "{" not in str(error["message"])
    assert error["type"] == ("server_error" if status == 500 else "authentication_error" if status == 401
                             else "invalid_request_error")  # fmt: skip


def test_what_is_no_json_becomes_the_envelope_too():
    for body in (b"Internal Server Error", b"", b"[1]", b'"x"', b"null", b'{"error": null}', b"\xff"):
        error = normalise(500, body, method="GET", path="/x")["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}


def test_the_context_length_is_about_messages_in_a_chat():
    body = json.dumps(
        {"error": {"message": "This model's maximum context length is 8 tokens.", "param": None}}
    ).encode()
    assert normalise(400, body, method="POST", path="/v1/chat/completions")["error"]["param"] == "messages"


def test_answers_pass_unchanged(monkeypatch):
    status, body, _ = Client(monkeypatch).ask("POST", "/v1/completions", b'{"prompt": "a"}')
    assert (status, json.loads(body)) == (200, {"echo": '{"prompt": "a"}'})
    assert Client(monkeypatch).ask("GET", "/health")[:2] == (503, b"{}"), "its readers look at the status only"


def test_a_failure_is_an_envelope_that_shows_nothing_of_the_server(monkeypatch):
    status, error = Client(monkeypatch).error("POST", "/v1/raise", b"{}")
    assert (status, error["type"]) == (500, "server_error") and "secret" not in error["message"]


def test_overload_says_when_to_try_again(monkeypatch):
    status, _, headers = Client(monkeypatch).ask("POST", "/v1/busy", b"{}")
    assert status == 503 and headers[b"retry-after"] == b"1"


@pytest.mark.parametrize(("path", "last"), [("/v1/stream", "data: [DONE]"), ("/v1/stream/raise", "data: {")])
def test_a_failure_in_a_stream_is_an_event(monkeypatch, path, last):
    status, body, _ = Client(monkeypatch).ask("POST", path, b"{}")
    events = body.decode().strip().split("\n\n")
    assert status == 200 and events[0] == 'data: {"choices": []}' and events[-1].startswith(last)
    error = json.loads(events[1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "server_error"
    assert "secret" not in error["message"]


def test_keys(monkeypatch):
    client = Client(monkeypatch, api_keys=["one", "two"])
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("GET", "/metrics"),
            ("POST", "/invocations"),
        ):
            status, error = client.error(method, path, headers=headers)
            assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
    for key in ("one", "two"):
        assert client.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
    assert client.ask("GET", "/health")[0] == 503, "what vLLM says: /health needs no key"
    assert client.ask("OPTIONS", "/v1/models")[0] == 200, "a browser asks without the key first"


def test_one_model(monkeypatch):
    client = Client(monkeypatch)
    status, body, _ = client.ask("GET", "/v1/models/org%2Fgpt")
    expected = {"id": "org/gpt", "object": "model", "has_chat_template": True}
    assert (status, json.loads(body)) == (200, expected)
    assert json.loads(client.ask("GET", "/v1/models/org/gpt")[1]) == expected
    assert json.loads(client.ask("GET", "/v1/models")[1])["data"][1] == expected
    status, error = client.error("GET", "/v1/models/none")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_a_body_has_a_largest_size_announced_or_not(monkeypatch):
    client = Client(monkeypatch, max_body=100)
    assert client.ask("POST", "/v1/completions", b"x" * 100)[0] == 200
    assert client.error("POST", "/v1/completions", b"x" * 101)[0] == 413
    assert client.error("POST", "/v1/completions", b"", headers={"Content-Length": "101"})[0] == 413


def test_requests_at_once_have_a_limit(monkeypatch):
    client = Client(monkeypatch, max_queue=1)
    client.app.in_flight = 1
    status, error = client.error("POST", "/v1/completions", b"{}")
    assert (status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert client.ask("GET", "/v1/models")[0] == 200
    client.app.in_flight = 0
    for _ in range(3):
        assert client.error("POST", "/v1/raise", b"{}")[0] == 500
    assert client.ask("POST", "/v1/completions", b"{}")[0] == 200, "places are given back after a failure"


def test_an_error_instead_of_the_models_is_no_empty_list(monkeypatch):
    async def dead(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "EngineCore died.", "code": 500}}'})

    client = Client(monkeypatch)
    client.app.app = dead
    for path in ("/v1/models", "/v1/models/tiny"):
        status, error = client.error("GET", path)
        assert (status, error["message"]) == (500, "EngineCore died.")


def test_the_chat_page_needs_no_key(monkeypatch):
    client = Client(monkeypatch, api_keys=["secret"], page={"folder": str(STATIC), "headers": PAGE_HEADERS})
    status, body, headers = client.ask("GET", "/")
    assert (status, headers[b"content-type"], body) == (200, b"text/html", (STATIC / "index.html").read_bytes())
    assert headers[b"content-security-policy"].startswith(b"default-src 'none'")
    assert client.ask("GET", "/app.js")[0] == 200
    assert client.ask("GET", "/../page.py")[0] == 401
    assert client.ask("GET", "/v1/models")[0] == 401
