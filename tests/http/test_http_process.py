"""`llmkit serve` as a process: signals, ports, keys, names, several checkpoints, TLS."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import threading
import time

import httpx
import pytest
from http_support import SECONDS, metric, server_process

from llmkit.cli.serve import add_aliases, open_models
from llmkit.testing.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", context=1024).path


def test_sigterm_lets_answers_end_and_takes_no_more(model):
    with server_process(model) as (process, url):
        lines: list[str] = []

        def ask() -> None:
            body = {"prompt": "Hi", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 16}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as answer:
                lines.extend(answer.iter_lines())

        client = threading.Thread(target=ask)
        client.start()
        deadline = time.monotonic() + SECONDS
        while metric(url, "llmkit_batch_size") < 16:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        client.join(SECONDS)
        assert process.wait(SECONDS) == 0
        assert lines[-2] == "data: [DONE]"
        reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines if line.startswith("data: {")]
        assert reasons.count("length") == 16, "all answers are whole"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=SECONDS)
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_ctrl_c_ends_cleanly_and_a_second_one_at_once(model):
    with server_process(model) as (process, url):
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    with server_process(model, "--drain-seconds", 300) as (process, url):
        body = {"prompt": "Hi", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 16}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 130
        assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_a_port_that_is_taken_is_said_at_once(model, run_cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_cli("serve", model, "--port", port, code=1)
    assert done.stderr == f"llmkit: error: cannot listen on 127.0.0.1, port {port}: Address already in use\n"


def test_other_machines_are_not_let_in_without_a_key(model, run_cli):
    done = run_cli("serve", model, "--host", "0.0.0.0", code=1)
    assert "API key is needed" in done.stderr
    done = run_cli("serve", model, "--api-key-file", model / "nothing", code=1)
    assert "nothing" in done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(model, run_cli, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    (broken / "tokenizer.json").write_text((model / "tokenizer.json").read_text())
    (broken / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text())
    done = run_cli("serve", broken, "--port", 0, code=1)
    assert "weights" in done.stderr or "safetensors" in done.stderr


def test_several_checkpoints_with_names_and_aliases(model, tmp_path):
    second = tiny_checkpoint(tmp_path / "second", seed=1).path
    with server_process(model, f"b={second}", "--alias", "gpt-4o", "--alias", "gpt-x=b") as (_, url):
        names = [card["id"] for card in httpx.get(f"{url}/v1/models", timeout=SECONDS).json()["data"]]
        assert names == ["tiny", "gpt-4o", "b", "gpt-x"]
        tokens = {}
        for name in (None, *names):
            body = {"model": name, "prompt": "Hi", "max_tokens": 10, "temperature": 0, "logprobs": 0}
            (choice,) = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).json()["choices"]
            tokens[name] = choice["logprobs"]["tokens"]
        assert tokens[None] == tokens["tiny"] == tokens["gpt-4o"] != tokens["b"] == tokens["gpt-x"]


def test_names_of_models(model, tmp_path):
    import click

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    step = tiny_checkpoint(run / "checkpoints" / "step_000010").path
    assert list(open_models((str(run), str(step), f"x={model}"))) == ["run", "run-step_000010", "x"]
    with pytest.raises(click.UsageError, match="two checkpoints are called tiny"):
        open_models((str(model), str(model)))
    models = open_models((str(model),))
    for alias, message in (("tiny", "is taken"), ("x=nothing", "there is no model"), ("=tiny", "needs a name")):
        with pytest.raises(click.UsageError, match=message):
            add_aliases(models, (alias,))


def test_arguments_behind_two_dashes_are_for_servers_that_take_them(model, run_cli):
    done = run_cli("serve", model, "--", "--max-num-seqs", "4", code=2)
    assert "takes no arguments behind --" in done.stderr


def test_tls(model, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    with server_process(model, "--tls-cert", certificate, "--tls-key", key) as (_, url):
        assert url.startswith("https://")
        assert httpx.get(f"{url}/health", verify=context, timeout=SECONDS).status_code == 200
