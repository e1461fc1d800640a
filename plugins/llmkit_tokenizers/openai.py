"""OpenAI's published vocabularies, fetched and cached by tiktoken (TIKTOKEN_CACHE_DIR)."""

from __future__ import annotations

from llmkit.bpe import ByteLevelBPE


def load(name: str) -> ByteLevelBPE:
    """The vocabulary `gpt2` or `cl100k_base`; our splitting rule of the same name gives tiktoken's ids.

    Raises ValueError where it is neither cached nor can be downloaded.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets through whatever its HTTP client, hash check or file system raises
        raise ValueError(
            f"the vocabulary {name!r} is not here and cannot be downloaded ({type(error).__name__}): set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or train one: llmkit tokenizer train"
        ) from error
    return ByteLevelBPE(
        name,
        encoding._mergeable_ranks,
        split=name,
        special_tokens=encoding._special_tokens,
    )
