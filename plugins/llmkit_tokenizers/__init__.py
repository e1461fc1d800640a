"""Tokenizers by name: `bpe` and `char` are trained on text; `byte`, `gpt2` and `cl100k_base` are fixed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmkit import hookimpl
from llmkit.tokenizer import END_OF_TEXT, Tokenizer, TokenizerProvider


class BPE(TokenizerProvider):
    """Byte-level BPE trained on the data: the fewest tokens for its size, and no character is unknown."""

    name = "bpe"
    trainable = True

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
        from llmkit.bpe import ByteLevelBPE

        return ByteLevelBPE.train(texts, vocab_size, special_tokens)


class Char(TokenizerProvider):
    """One id per character seen in the data, and one for all others: for small experiments."""

    name = "char"
    trainable = True

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
        from llmkit.char_tokenizer import CharTokenizer

        return CharTokenizer.train(texts, vocab_size, special_tokens)


class Byte(TokenizerProvider):
    """The 256 bytes and an end-of-text token."""

    name = "byte"

    @classmethod
    def load(cls) -> Tokenizer:
        from llmkit.bpe import ByteLevelBPE

        ranks = {bytes([byte]): byte for byte in range(256)}
        return ByteLevelBPE(cls.name, ranks, special_tokens={END_OF_TEXT: 256})


class GPT2(TokenizerProvider):
    """GPT-2's 50,257 tokens, through tiktoken."""

    name = "gpt2"

    @classmethod
    def load(cls) -> Tokenizer:
        from llmkit_tokenizers.openai import load

        return load(cls.name)


class CL100K(TokenizerProvider):
    """GPT-4's 100,277 tokens (cl100k_base), through tiktoken."""

    name = "cl100k_base"

    @classmethod
    def load(cls) -> Tokenizer:
        from llmkit_tokenizers.openai import load

        return load(cls.name)


@hookimpl
def llmkit_register_tokenizers() -> list[type[TokenizerProvider]]:
    return [BPE, Byte, Char, GPT2, CL100K]
