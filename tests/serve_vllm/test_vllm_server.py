"""`llmkit serve --server vllm` with a real vLLM, a GPT-2 trained here, and the openai SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.engine import GenerateRequest, Sampling
from llmkit.testing import tiny_data

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]  # one at a time: 5 GB, and all cores

KEY = "a-key-of-the-tests"
PATIENCE = 600.0  # until vLLM, on a machine that has much else to do, has surely hung
PROMPT = "2 and 3 make"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a GPT-2 that has seen a few sums, with heads of a size that vLLM's CPU kernels have."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny_data(folder / "data").path
    command = [sys.executable, "-m", "llmkit", "train", "--backend", "torch", "--data", str(data), "--depth", "2",
               "--width", "64", "--heads", "2", "--sequence-length", "64", "--batch-size", "8",
               "--total-batch-tokens", "512", "--learning-rate", "0.01", "--warmup-steps", "4", "--dtype", "fp32",
               "--steps", "60", "--out", str(folder / "sums")]  # fmt: skip
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return folder / "sums"


class Serving:
    """A running `llmkit serve --server vllm`."""

    def __init__(self, vllm_python: Path, log: Path, *args: object, **extra: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "llmkit", "serve", "--server", "vllm", "--port", "0"]
        environment = {**os.environ, "LLMKIT_VLLM_PYTHON": str(vllm_python), "VLLM_CPU_KVCACHE_SPACE": "1", **extra}
        with log.open("w") as file:
            self.process = subprocess.Popen([*command, *map(str, args)], env=environment, stderr=file)
        self.started: set[psutil.Process] = set()

    def look(self) -> set[psutil.Process]:
        """All processes that it has started so far."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.started |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.started

    def find(self, word: str) -> psutil.Process | None:
        """One of its processes by a word of its title."""
        for process in self.look():
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in process.name() + " ".join(process.cmdline()):
                    return process
        return None

    @property
    def url(self) -> str:
        """Its address, once it is ready."""
        self.wait(lambda: " at http" in self.log.read_text())
        self.look()
        found = re.search(r" at (http\S+)", self.log.read_text())
        assert found is not None
        return found[1]

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            self.look()
            time.sleep(0.1)

    def end(self) -> int:
        """Its exit code; none of its processes may be left."""
        code = self.process.wait(PATIENCE)
        _, alive = psutil.wait_procs(self.started, timeout=60)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        return code

    def kill(self) -> None:
        self.look()
        self.process.kill()
        self.process.wait()
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def serving(vllm_python, trained) -> Iterator[Serving]:
    """One server for all tests: it takes most of a minute to start."""
    serving = Serving(vllm_python, trained.parent / "log", trained, "--alias", "gpt", LLMKIT_API_KEYS=KEY)
    yield serving
    serving.kill()


@pytest.fixture
def client(serving) -> Any:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def expected(trained) -> list[int]:
    """The greedy continuation of PROMPT by the embedded engine."""
    from llmkit_engine.engine import EmbeddedEngine

    checkpoint = Checkpoint.open(trained)
    prompt = tuple(checkpoint.tokenizer.encode_prompt(PROMPT))
    with EmbeddedEngine.open(checkpoint) as engine:
        chunks = list(engine.generate([GenerateRequest(0, prompt, Sampling(max_tokens=20, temperature=0))]))
    return [token for chunk in chunks for token in chunk.tokens]


def complete(client: Any, prompt: object, **options: Any) -> Any:
    options = {"max_tokens": 20, "temperature": 0, "extra_body": {"return_token_ids": True}, **options}
    return client.completions.create(model="sums", prompt=prompt, **options)


def test_greedy_tokens_are_those_of_the_embedded_engine(client, trained, expected):
    tokenizer = Checkpoint.open(trained).tokenizer
    for prompt in (PROMPT, tokenizer.encode_prompt(PROMPT)):
        choice = complete(client, prompt).choices[0]
        assert [token for token in choice.token_ids if token != tokenizer.eot_id] == expected
    text = tokenizer.decode(expected)
    assert choice.text == text
    pieces = list(complete(client, PROMPT, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == text
    assert len([piece for piece in pieces if piece.choices]) > 4
    assert pieces[-1].usage.completion_tokens == complete(client, PROMPT).usage.completion_tokens


def test_many_at_once_get_the_same(serving, expected, trained):
    text = Checkpoint.open(trained).tokenizer.decode(expected)

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(*(complete(client, PROMPT) for _ in range(16)))
        return [answer.choices[0].text for answer in answers]

    assert set(asyncio.run(ask())) == {text}


def test_models_and_their_names(client):
    assert [model.id for model in client.models.list()] == ["sums", "gpt"]
    assert client.models.retrieve("gpt").id == "gpt"
    assert client.completions.create(model="gpt", prompt=PROMPT, max_tokens=1).choices
    for ask in (lambda: client.models.retrieve("no"), lambda: client.completions.create(model="no", prompt="a")):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def ask_raw(serving: Serving, method: str, path: str, body: bytes | None = None, key: str = KEY) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(serving.url + path, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "message"),
    [
        (
            {"prompt": "a" * 100},
            400,
            "prompt",
            "context_length_exceeded",
            "maximum context length is 64 tokens. However",
        ),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", None, "non-negative"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", None, "valid number"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", None, "at least 1"),
        ({"prompt": [10**6]}, 400, None, None, "vocab"),
        (b"{", 400, None, None, "The body is not JSON"),
        (b"[" + b" " * 9 * 2**20 + b"]", 413, None, None, "larger than"),
    ],
)
def test_errors_come_in_the_envelope(serving, body, status, param, code, message):
    data = body if isinstance(body, bytes) else json.dumps({"model": "sums", **body}).encode()
    got, value = ask_raw(serving, "POST", "/v1/completions", data)
    assert set(value["error"]) == {"message", "type", "param", "code"}
    assert (got, value["error"]["code"]) == (status, code) and message in value["error"]["message"]
    assert param in (None, value["error"]["param"]) and value["error"]["type"] == "invalid_request_error"


def test_paths_methods_and_keys(serving):
    for method, path, status in (("GET", "/v1/none", 404), ("PUT", "/v1/completions", 405)):
        got, value = ask_raw(serving, method, path)
        assert got == status and path in value["error"]["message"]
    for path in ("/v1/models", "/metrics", "/tokenize"):
        got, value = ask_raw(serving, "GET", path, key="wrong")
        assert (got, value["error"]["code"]) == (401, "invalid_api_key")
    assert ask_raw(serving, "GET", "/health", key="")[0] == 200
    assert ask_raw(serving, "POST", "/tokenize", json.dumps({"model": "sums", "prompt": "abc"}).encode())[0] == 200


def test_a_client_that_leaves_ends_its_request(serving, client):
    for piece in complete(client, PROMPT, stream=True, max_tokens=50, extra_body={"ignore_eos": True}):
        assert piece.choices
        break

    def running() -> float:
        metrics = ask_raw(serving, "GET", "/metrics")[1].decode()
        return sum(float(line.split()[-1]) for line in metrics.splitlines() if "num_requests_running{" in line)

    serving.wait(lambda: running() == 0)


def test_kill_of_the_worker_ends_the_server_with_an_error(serving):
    """Last of those with this server."""
    assert serving.url
    worker = serving.find("VLLM::Worker")
    assert worker is not None
    worker.kill()
    assert serving.end() == 1
    log = serving.log.read_text()
    assert "llmkit: error: vLLM's engine has died" in log or "llmkit: error: vLLM has ended by itself" in log
    assert "Traceback" not in log.split("its last lines:")[0]


def certificate(folder: Path) -> list[object]:
    """Flags for https with a certificate of our own; none where there is no openssl to make one."""
    if shutil.which("openssl") is None:
        return []
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return ["--tls-cert", cert, "--tls-key", key]


def test_a_model_file_of_llmc_is_served_and_ctrl_c_lets_answers_end(run_cli, vllm_python, trained, tmp_path, expected):
    """Over https, and with an option of vLLM's own."""
    run_cli("export", trained, tmp_path / "model.bin", "--format", "llmc")
    shutil.copy(Checkpoint.open(trained).path / "tokenizer.json", tmp_path)
    tls = certificate(tmp_path)
    serving = Serving(vllm_python, tmp_path / "log", tmp_path / "model.bin", *tls, "--", "--enforce-eager")
    try:
        assert serving.url.startswith("https://" if tls else "http://")
        http = openai.DefaultHttpxClient(verify=False)
        client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0, http_client=http)
        options = {"max_tokens": len(expected), "temperature": 0, "extra_body": {"return_token_ids": True}}
        tokens: list[int] = []
        for piece in client.completions.create(model="model", prompt=PROMPT, stream=True, **options):
            if not tokens:
                serving.process.send_signal(signal.SIGINT)
            tokens += piece.choices[0].token_ids or []
        assert tokens[: len(expected)] == expected
        assert serving.end() == 0
    finally:
        serving.kill()


def test_our_own_death_while_vllm_starts_is_its_death_too(vllm_python, trained, tmp_path):
    serving = Serving(vllm_python, tmp_path / "log", trained)
    try:
        serving.wait(lambda: serving.find("VLLM::EngineCore") is not None)
        serving.process.kill()
        serving.end()
    finally:
        serving.kill()
