"""Errors: each case with its status, code and parameter, always in the envelope with its four fields."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from http_support import SECONDS
from openai import OpenAI

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"prompt": "Hi", "max_tokens": 2}


def envelope(answer):
    """The four fields of an error."""
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    return error


def post(url, path, body):
    return httpx.post(url + path, json=body, timeout=SECONDS)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("/v1/completions", {**TEXT, "model": "gpt-9"}, 404, "model", "model_not_found"),
        ("/v1/chat/completions", {**CHAT, "model": "gpt-9"}, 404, "model", "model_not_found"),
        ("/v1/responses", {"input": "Hi", "model": "gpt-9"}, 404, "model", "model_not_found"),
        ("/tokenize", {"prompt": "Hi", "model": "gpt-9"}, 404, "model", "model_not_found"),
        ("/v1/completions", {"prompt": "x" * 5000}, 400, "prompt", "context_length_exceeded"),
        ("/v1/completions", {"prompt": [5] * 1024}, 400, "prompt", "context_length_exceeded"),
        ("/v1/completions", {"prompt": "x" * 5_000_000}, 400, "prompt", "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 2000}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ("/v1/responses", {"input": "x" * 2000}, 400, "input", "context_length_exceeded"),
        ("/v1/completions", {**TEXT, "temperature": -1}, 400, "temperature", None),
        ("/v1/completions", {**TEXT, "temperature": "hot"}, 400, "temperature", None),
        ("/v1/completions", {**TEXT, "top_p": 0}, 400, "top_p", None),
        ("/v1/completions", {**TEXT, "n": 0}, 400, "n", None),
        ("/v1/completions", {**TEXT, "n": 1000}, 400, "n", None),
        ("/v1/completions", {**TEXT, "max_tokens": -1}, 400, "max_tokens", None),
        ("/v1/completions", {**TEXT, "logprobs": 21}, 400, "logprobs", None),
        ("/v1/completions", {**TEXT, "stop": ""}, 400, "stop", None),
        ("/v1/completions", {**TEXT, "stop": ["a"] * 17}, 400, "stop", None),
        ("/v1/completions", {**TEXT, "logit_bias": {"x": 1}}, 400, "logit_bias", None),
        ("/v1/completions", {**TEXT, "logit_bias": {"1": 101}}, 400, "logit_bias", None),
        ("/v1/completions", {**TEXT, "logit_bias": {"99999": 1}}, 400, "logit_bias", None),
        ("/v1/completions", {**TEXT, "stop_token_ids": [99999]}, 400, "stop_token_ids", None),
        ("/v1/completions", {"prompt": []}, 400, "prompt", None),
        ("/v1/completions", {"prompt": [[]]}, 400, "prompt", None),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt", None),
        ("/v1/completions", {"prompt": [99999]}, 400, "prompt", None),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt", None),
        ("/v1/completions", {"prompt": ["a"] * 1000}, 400, "prompt", None),
        ("/v1/chat/completions", {"messages": []}, 400, "messages", None),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "Hi"}]}, 400, "messages", None),
        ("/v1/chat/completions", {}, 400, "messages", None),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", None),
        (
            "/v1/chat/completions",
            {**CHAT, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            400,
            "tool_choice",
            None,
        ),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, 400, "response_format", None),
        ("/v1/responses", {"input": []}, 400, "input", None),
        ("/v1/responses", {"input": [{"type": "computer_call"}]}, 400, "input", None),
        ("/tokenize", {}, 400, "prompt", None),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens", None),
    ],
)
def test_a_bad_request_names_its_parameter(tiny_url, path, body, status, param, code):
    answer = post(tiny_url, path, body)
    error = envelope(answer)
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    if body.get("stream") is None and "model" not in (param or ""):
        assert envelope(post(tiny_url, path, {**body, "stream": True}))["param"] == param


def test_the_context_is_named_in_the_known_words(tiny_url):
    message = envelope(post(tiny_url, "/v1/completions", {"prompt": [5] * 1030}))["message"]
    assert message.startswith(
        "This model's maximum context length is 1024 tokens. However, your prompt has 1030 tokens"
    )


@pytest.mark.parametrize("content", [b"{", b"[1]", b"nonsense", b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": 1e999}'])
def test_a_body_that_is_no_json_object(tiny_url, content):
    answer = httpx.post(
        f"{tiny_url}/v1/completions", content=content, headers={"Content-Type": "application/json"}, timeout=SECONDS
    )
    assert answer.status_code == 400 and envelope(answer)["message"]


def test_a_body_of_another_type_is_refused(tiny_url):
    """A page of another site may send text/plain without asking; it must not be taken for JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = httpx.post(
            f"{tiny_url}/v1/completions", content=b'{"prompt": "Hi"}', headers={"Content-Type": kind}, timeout=SECONDS
        )
        assert answer.status_code == 400 and envelope(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/..%2f..%2fapp.py", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/gpt-9", 404),
    ],
)
def test_unknown_paths_and_methods(tiny_url, method, path, status):
    answer = httpx.request(method, tiny_url + path, timeout=SECONDS)
    assert answer.status_code == status and envelope(answer)


def test_the_sdk_raises_its_own_errors(tiny_url):
    with OpenAI(base_url=f"{tiny_url}/v1", api_key="none") as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="gpt-9", prompt="Hi")
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt=[1] * 2000)
        assert long.value.code == "context_length_exceeded"


def test_models_and_aliases(tiny_url):
    with OpenAI(base_url=f"{tiny_url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny", "other-name"]
        assert client.models.retrieve("other-name").id == "other-name"
        asked: Any = {"prompt": "Hi", "max_tokens": 4, "temperature": 0}
        texts = {client.completions.create(model=name, **asked).choices[0].text for name in ("tiny", "other-name")}
        assert len(texts) == 1
