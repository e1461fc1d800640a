"""Prompts: text and conversations as token ids, checked against the model's context."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from llmkit_http.errors import APIError, bad_request
from llmkit_http.models import Model

LONG_TEXT = 20_000  # characters from which on text is tokenised outside the event loop, as it takes milliseconds


def too_long(model: Model, tokens: int | str, param: str) -> APIError:
    limit = model.engine.context_length
    return bad_request(
        f"This model's maximum context length is {limit} tokens. However, your {param} has {tokens} tokens, "
        f"and at least one more is needed for the answer. Please shorten it.",
        param,
        "context_length_exceeded",
    )


def check_ids(model: Model, ids: Sequence[int], param: str) -> tuple[int, ...]:
    """The ids of a prompt. Raises APIError for an empty one, one that is too long, and ids that the model lacks."""
    if not ids:
        raise bad_request(f"{param}: it is empty, and a model needs at least one token to begin with", param)
    if len(ids) >= model.engine.context_length:
        raise too_long(model, len(ids), param)
    if max(ids) >= model.engine.vocab_size:
        raise bad_request(
            f"{param}: token id {max(ids)} is outside the model's vocabulary of {model.engine.vocab_size}", param
        )
    return tuple(ids)


async def encode(model: Model, text: str, param: str, how: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The ids of a text by `how`. Raises APIError as `check_ids` does."""
    if len(text) > model.engine.context_length * model.longest_token:  # it cannot fit: spare the work
        raise too_long(model, f"more than {model.engine.context_length}", param)
    try:
        ids = how(text) if len(text) < LONG_TEXT else await asyncio.to_thread(how, text)
    except ValueError as error:  # characters that the tokenizer does not have
        raise bad_request(f"{param}: {error}", param) from None
    return check_ids(model, ids, param)


async def encode_prompts(model: Model, prompt: Any) -> tuple[list[tuple[int, ...]], list[str | None]]:
    """The ids of `prompt` as /v1/completions takes it, and the texts of those that were given as text."""
    tokenizer = model.checkpoint.tokenizer
    if prompt is None or prompt == "":
        start = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise bad_request("prompt: it is empty, and the model has no token to begin a text with", "prompt")
        return [(start,)], [""]
    several = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not several:
        raise bad_request("prompt: the list is empty", "prompt")

    def how(text: str) -> list[int]:
        return tokenizer.encode_prompt(text, allow_special=True)

    ids: list[tuple[int, ...]] = []
    for each in several:
        ids.append(
            await encode(model, each, "prompt", how) if isinstance(each, str) else check_ids(model, each, "prompt")
        )
    return ids, [each if isinstance(each, str) else None for each in several]
