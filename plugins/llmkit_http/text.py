"""Tokens as text, for log-probabilities."""

from __future__ import annotations

from llmkit.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; OpenAI's `bytes:\\xff` form for one that is not whole UTF-8."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one token, none for an id that only pads the model's vocabulary."""
    return tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""
