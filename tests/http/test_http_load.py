"""Load with faults, for some seconds: see load_support.py for who does what."""

from __future__ import annotations

import asyncio

import httpx
import psutil
from http_support import SECONDS, metric, server_process, wait_for_metric
from load_support import PROMPTS, load


def test_load_with_faults_changes_no_answer_and_leaks_nothing(test_data):
    model = test_data / "models" / "stories260k-hf"
    with server_process(model, "--max-queue", 48) as (process, url):
        alone = {}
        for prompt in PROMPTS:
            body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).json()
            alone[prompt] = {answer["choices"][0]["text"]}
        asyncio.run(load(url, clients=100, seconds=3))
        memory = psutil.Process(process.pid).memory_info().rss
        outcome = asyncio.run(load(url, clients=200, seconds=8, seed=1))
        assert {status for status in outcome.statuses if " 5" in status and not status.endswith(" 503")} == set()
        assert outcome.statuses["well-behaved 200"] > 20 and outcome.incomplete == 0
        assert all(outcome.answers[prompt] == alone[prompt] for prompt in outcome.answers)
        wait_for_metric(url, "llmkit_generations", 0)
        assert metric(url, "llmkit_batch_size") == metric(url, "llmkit_kv_cache_usage") == 0
        assert psutil.Process(process.pid).memory_info().rss < memory + 64 * 2**20
        process.terminate()
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
