"""Contracts of tokenizers and data sources."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llmkit.data.source import DataSource, Text
from llmkit.plugins import NAME
from llmkit.testing.tiny import TEXT
from llmkit.tokenizer import END_OF_TEXT, Tokenizer, TokenizerProvider, load_tokenizer

SAMPLES = (
    "",
    "a",
    " The quick brown fox.\n",
    "1 2 34567",
    "naïve Ελλάδα 日本語 🙂",
    "def f(x):\n\treturn x\n",
    END_OF_TEXT,
)


class TokenizerContract:
    """Give the fixture `provider`. Set `lossless` to False where some characters have no id."""

    lossless = True

    @pytest.fixture
    def provider(self) -> type[TokenizerProvider]:
        raise NotImplementedError("a subclass of TokenizerContract gives the fixture `provider`")

    @pytest.fixture
    def tokenizer(self, provider: type[TokenizerProvider]) -> Tokenizer:
        if provider.trainable:
            return provider.train([TEXT, *SAMPLES[:-1]], vocab_size=512, special_tokens=(END_OF_TEXT,))
        return provider.load()

    def test_has_a_name_and_a_summary(self, provider: type[TokenizerProvider]) -> None:
        assert NAME.fullmatch(provider.name)
        assert provider.summary()

    def test_text_comes_back(self, tokenizer: Tokenizer) -> None:
        for text in SAMPLES:
            ids = tokenizer.encode(text)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            if self.lossless:
                assert tokenizer.decode(ids) == text
                assert tokenizer.decode_bytes(ids) == text.encode()
            assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == tokenizer.decode_bytes(ids)

    def test_a_batch_is_the_same(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]

    def test_special_tokens_are_text_unless_allowed(self, tokenizer: Tokenizer) -> None:
        for text, index in tokenizer.special_tokens.items():
            assert index not in tokenizer.encode(f"a{text}b")
            assert index in tokenizer.encode(f"a{text}b", allow_special=True)

    def test_ids_out_of_range_are_refused(self, tokenizer: Tokenizer) -> None:
        for index in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError):
                tokenizer.decode([index])

    def test_it_saves_and_loads(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
        assert loaded.encode_batch([TEXT, *SAMPLES]) == tokenizer.encode_batch([TEXT, *SAMPLES])


class DataSourceContract:
    """Give the fixture `source`, an instance. It must be readable where the tests run."""

    @pytest.fixture
    def source(self) -> DataSource:
        raise NotImplementedError("a subclass of DataSourceContract gives the fixture `source`")

    def test_has_a_name_and_a_summary(self, source: DataSource) -> None:
        assert NAME.fullmatch(source.name)
        assert source.summary()

    def test_documents_come_in_the_same_order(self, source: DataSource) -> None:
        first = list(itertools.islice(source.documents(), 20))
        assert first, "the source has no documents"
        assert all(isinstance(item, Text) for item in first)
        assert [item.text for item in itertools.islice(source.documents(), 20)] == [item.text for item in first]

    def test_positions_go_forward(self, source: DataSource) -> None:
        positions = [item.position for item in itertools.islice(source.documents(), 50) if item.position is not None]
        assert positions == sorted(positions)
        assert all(0 <= position <= 1 for position in positions)
