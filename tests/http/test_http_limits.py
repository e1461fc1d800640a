"""Who may ask, how much, and what becomes of a request whose client has gone."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from http_support import SECONDS, metric, serving, stories, wait_for_metric

from llmkit.server import API_KEYS_VARIABLE
from llmkit.testing.tiny import tiny_checkpoint
from llmkit_http.options import HttpOptions

LONG = {"prompt": "Once upon a time", "max_tokens": 100_000, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def small(tmp_path):
    return {"tiny": tiny_checkpoint(tmp_path / "tiny")}


@pytest.fixture
def slow(test_data, monkeypatch):
    """A model whose steps take 50 ms, so that a long answer lasts."""
    from llmkit_engine.engine import EmbeddedEngine

    step = EmbeddedEngine.step

    def slowly(self):
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(EmbeddedEngine, "step", slowly)
    return {"stories": stories(test_data)}


def connect(url):
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=SECONDS)


def send(connection, path, body):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)


# --- keys and hosts


def test_a_key_is_needed_where_there_are_keys(small, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\n\nsecond-key\n")
    with serving(small, api_key_file=str(keys)) as url:
        for path, method in (
            ("/v1/models", "GET"),
            ("/v1/completions", "POST"),
            ("/metrics", "GET"),
            ("/tokenize", "POST"),
        ):
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "first-key"},
                {"Authorization": "Bearer"},
            ):
                answer = httpx.request(method, url + path, headers=header, json={}, timeout=SECONDS)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", (path, header)
        for key in ("first-key", "second-key"):
            header = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=header, timeout=SECONDS).status_code == 200
        for path in ("/health", "/docs", "/openapi.json"):
            assert httpx.get(url + path, timeout=SECONDS).status_code == 200


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv(API_KEYS_VARIABLE, "one two")
    assert HttpOptions(host="0.0.0.0").read_api_keys() == ["one", "two"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_other_machines_need_a_key(monkeypatch, host):
    monkeypatch.delenv(API_KEYS_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="API key is needed"):
        HttpOptions(host=host).read_api_keys()
    assert HttpOptions(host="::1").read_api_keys() == []


def test_a_server_without_keys_is_called_by_names_of_this_machine_only(tiny_url):
    for host, status in (("evil.example", 403), ("evil.example:80", 403), ("localhost:9", 200), ("[::1]:9", 200)):
        assert httpx.get(f"{tiny_url}/health", headers={"Host": host}, timeout=SECONDS).status_code == status


def test_cors_is_off_unless_asked_for(tiny_url, small):
    header = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{tiny_url}/v1/completions", headers=header, timeout=SECONDS)
    assert "access-control-allow-origin" not in answer.headers
    with serving(small, cors_origin="https://page.example") as url:
        for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
            answer = httpx.get(f"{url}/v1/models", headers={"Origin": origin}, timeout=SECONDS)
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed


# --- sizes


def test_a_body_that_is_too_large_is_refused(small):
    with serving(small, max_body=1) as url:
        content = json.dumps({"prompt": "x" * 2**20}).encode()
        header = {"Content-Type": "application/json"}
        declared = httpx.post(f"{url}/v1/completions", content=content, headers=header, timeout=SECONDS)
        chunks = (content[at : at + 2**16] for at in range(0, len(content), 2**16))
        chunked = httpx.post(f"{url}/v1/completions", content=chunks, headers=header, timeout=SECONDS)
        for answer in (declared, chunked):
            assert answer.status_code == 413 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_head_that_is_too_large_ends_the_connection(tiny_url):
    with connect(tiny_url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 2**24:
                connection.sendall(f"X-Header-{sent}: {'x' * 1000}\r\n".encode())
                sent += 1000
        assert sent < 2**24
    assert httpx.get(f"{tiny_url}/health", timeout=SECONDS).status_code == 200


def test_limits_of_n_and_max_tokens(small):
    with serving(small, max_n=2, max_tokens=5) as url:
        for body, param in (({"n": 3}, "n"), ({"max_tokens": 6}, "max_tokens")):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", **body}, timeout=SECONDS)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        said = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=said, timeout=SECONDS)
        assert answer.json()["usage"]["completion_tokens"] == 5


# --- the queue, and clients that go


def test_a_full_queue_answers_429_and_recovers(slow):
    with serving(slow, max_queue=2) as url, httpx.Client(timeout=SECONDS) as client:
        with client.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 2, "stream": True}) as running:
            next(running.iter_bytes())
            refused = client.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 1})
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert client.get(f"{url}/health").status_code == 200
        wait_for_metric(url, "llmkit_generations", 0)
        assert client.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_client_that_goes_ends_its_generations(slow, path, stream):
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {**LONG, "n": 3},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "n": 3},
        "/v1/responses": {"input": "Hi"},
    }
    body = bodies[path]
    with serving(slow) as url:
        with connect(url) as connection:
            send(connection, path, {**body, "stream": stream})
            wait_for_metric(url, "llmkit_batch_size", 1 if path == "/v1/responses" else 3)
        wait_for_metric(url, "llmkit_generations", 0)
        assert metric(url, "llmkit_batch_size") == 0 and metric(url, "llmkit_kv_cache_usage") == 0
        assert metric(url, "llmkit_generated_tokens_total") < 400, "the context holds 512"


def test_metrics_count_what_happens(small):
    with serving(small) as url:
        httpx.post(
            f"{url}/v1/completions", json={"prompt": "abc", "max_tokens": 7, "ignore_eos": True}, timeout=SECONDS
        )
        httpx.post(f"{url}/v1/completions", json={"prompt": 5}, timeout=SECONDS)
        text = httpx.get(f"{url}/metrics", timeout=SECONDS).text
        assert 'llmkit_http_requests_total{path="/v1/completions",status="200"} 1.0' in text
        assert 'llmkit_http_requests_total{path="/v1/completions",status="400"} 1.0' in text
        assert metric(url, "llmkit_generated_tokens_total") == 7 and metric(url, "llmkit_prompt_tokens_total") == 3
        assert metric(url, "llmkit_time_to_first_token_seconds_count") == 1
        assert metric(url, "llmkit_generated_tokens_per_second") > 0


def test_documents_and_page(tiny_url):
    document = httpx.get(f"{tiny_url}/openapi.json", timeout=SECONDS).json()
    paths = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"}
    assert paths | {"/health", "/metrics", "/v1/models/{model}"} == set(document["paths"])
    page = httpx.get(f"{tiny_url}/docs", timeout=SECONDS)
    assert page.status_code == 200 and "/v1/chat/completions" in page.text
    assert "http://" not in page.text and "https://" not in page.text, "the page asks no other host"


def test_an_engine_without_asynchronous_interface_is_served_too(small, monkeypatch):
    """The engine transformers, whose requests run batch by batch in a thread."""
    with serving(small, engine="transformers") as url:
        asked = {"prompt": ["One", "Two", "Three"], "max_tokens": 8, "temperature": 0}
        whole = httpx.post(f"{url}/v1/completions", json=asked, timeout=SECONDS).json()
        with serving(small) as embedded:
            other = httpx.post(f"{embedded}/v1/completions", json=asked, timeout=SECONDS).json()
        assert [choice["text"] for choice in whole["choices"]] == [choice["text"] for choice in other["choices"]]
        wanted = {"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_object"}}
        refused = httpx.post(f"{url}/v1/chat/completions", json=wanted, timeout=SECONDS)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format"


def test_a_failing_engine_is_a_503_and_not_ready(small, monkeypatch):
    from llmkit_engine.scheduler import Scheduler

    with serving(small) as url:
        monkeypatch.setattr(Scheduler, "step", lambda self: 1 / 0)
        body = {"prompt": "Hi", "max_tokens": 5}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).status_code == 503
        health = httpx.get(f"{url}/health", timeout=SECONDS)
        assert health.status_code == 503 and health.json() == {"status": "failed"}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).status_code == 503


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Once"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once"}]}),
        ("/v1/responses", {"input": "Once"}),
    ],
)
def test_a_failure_in_the_middle_of_a_stream_is_an_event(test_data, monkeypatch, path, body):
    from llmkit_engine.scheduler import Scheduler

    step, steps = Scheduler.step, itertools.count()

    def failing(self):
        if next(steps) > 6:
            raise MemoryError("no more")
        step(self)

    with serving({"stories": stories(test_data)}) as url:
        monkeypatch.setattr(Scheduler, "step", failing)
        text = httpx.post(url + path, json={**body, "stream": True}, timeout=SECONDS).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
        assert len(events) > 4 and "error" not in events[2] and "[DONE]" not in text
