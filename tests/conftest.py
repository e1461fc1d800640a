"""Fixtures of all tests: a cache of its own for each session, and the shared test data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub; read when huggingface_hub is imported


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test may read or change the user's cache."""
    os.environ["LLMKIT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real evaluation sets, text and tokenizers, kept outside the repository."""
    path = Path(os.environ.get("LLMKIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data in {path}: set LLMKIT_TEST_DATA")
    return path
