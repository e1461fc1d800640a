"""The character tokenizer: ids by code point, and the same ids through tokenizers and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmkit.char_tokenizer import UNKNOWN, CharTokenizer
from llmkit.hf_tokenizer import HFTokenizer
from llmkit.plugins import get_plugins
from llmkit.testing.data import SAMPLES, TokenizerContract
from llmkit.tokenizer import Tokenizer, TokenizerProvider, load_tokenizer


@pytest.fixture(scope="session")
def characters() -> CharTokenizer:
    return CharTokenizer.train(["hello wörld\n", "日本\t\x00"], 8192, ["<|a|>"])


def test_characters_have_ids_by_code_point(characters: CharTokenizer) -> None:
    assert characters.vocab_size == len(set("hello wörld\n日本\t\x00")) + 3
    assert characters.encode("\x00\t\n ") == [0, 1, 2, 3]
    assert characters.encode("hello") != characters.encode("hellq")
    assert characters.decode(characters.encode("wörld x")) == f"wörld {UNKNOWN}"


def test_character_tokenizer_reads_back_with_the_same_ids(characters: CharTokenizer, tmp_path: Path) -> None:
    characters.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, CharTokenizer)
    assert again.fingerprint == characters.fingerprint
    text = "hello <|endoftext|>wörld\r\n日本é<|a|>🎉"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == again.encode(text, allow_special=True)
    assert HFTokenizer(tmp_path / "tokenizer.json").encode(text) == again.encode(text)
    assert HFTokenizer(tmp_path / "tokenizer.json").decode_bytes(again.encode(text)) == again.decode_bytes(
        again.encode(text)
    )


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_character_round_trip(text: str) -> None:
    if text:
        tokenizer = CharTokenizer.train([text], 10_000, [])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_the_most_frequent_characters_are_kept_where_the_vocabulary_is_small() -> None:
    tokenizer = CharTokenizer.train(["aaabbc"], 4, [])
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("abc") == [0, 1, tokenizer.special_tokens[UNKNOWN]]
    with pytest.raises(ValueError, match="too small"):
        CharTokenizer.train(["a"], 2, [])
    with pytest.raises(ValueError, match="no text"):
        CharTokenizer.train([], 10, [])


class TestChar(TokenizerContract):
    @pytest.fixture
    def provider(self) -> type[TokenizerProvider]:
        return get_plugins().tokenizer("char")

    @pytest.fixture
    def tokenizer(self, provider: type[TokenizerProvider]) -> Tokenizer:
        """Trained on the characters of the special tokens too: any other character would be the unknown one."""
        return provider.train([*SAMPLES, UNKNOWN], vocab_size=512, special_tokens=())
