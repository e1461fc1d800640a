"""`llmkit tokenizer train` and `eval` from the command line."""

from __future__ import annotations

import json
import os

import pytest

from llmkit.testing import TEXT
from llmkit.tokenizer import load_tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_train_writes_a_tokenizer_that_loads(run_cli, text, tmp_path):
    out = tmp_path / "tokenizer"
    options = ["--vocab-size", 300, "--special-token", "<|user|>", "--json"]
    done = run_cli("tokenizer", "train", text, "--out", out, *options)
    assert json.loads(done.stdout)["vocab_size"] == 300
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert set(tokenizer.special_tokens) == {"<|endoftext|>", "<|user|>"}
    again = run_cli("tokenizer", "train", text, "--vocab-size", 300, "--out", out, code=1)
    assert str(out) in again.stderr
    small = run_cli("tokenizer", "train", text, "--vocab-size", 10, "--out", tmp_path / "x", code=1)
    assert "a vocabulary of 10 is too small" in small.stderr


def test_eval_compares_with_gpt2_and_gpt4(run_cli, text, tmp_path, test_data):
    run_cli("tokenizer", "train", text, "--vocab-size", 300, "--out", tmp_path / "tokenizer")
    cache = {**os.environ, "TIKTOKEN_CACHE_DIR": str(test_data / "tokenizers" / "tiktoken_cache")}
    done = run_cli("tokenizer", "eval", tmp_path / "tokenizer", text, "--json", env=cache)
    shown = json.dumps(json.loads(done.stdout))
    assert "gpt2" in shown and "cl100k_base" in shown and "bytes_per_token" in shown
    empty = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    done = run_cli("tokenizer", "eval", tmp_path / "tokenizer", text, env=empty)  # no vocabulary is no error
    assert "gpt2" in done.stdout + done.stderr
