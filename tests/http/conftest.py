"""Servers that many tests share: of a tiny random GPT-2, and of a small real Llama."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_support import serving, stories
from openai import OpenAI

from llmkit.testing.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a model with random weights and the byte tokenizer, under two names."""
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", context=1024)
    with serving({"tiny": checkpoint, "other-name": checkpoint}) as url:
        yield url


@pytest.fixture(scope="session")
def stories_url(test_data: Path) -> Iterator[str]:
    with serving({"stories": stories(test_data)}) as url:
        yield url


@pytest.fixture(scope="session")
def stories_client(stories_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stories_url}/v1", api_key="none", max_retries=0) as client:
        yield client
