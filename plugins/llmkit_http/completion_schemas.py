"""Request and answers of /v1/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmkit_http.schemas import AnswerModel, SamplingFields, TokenId, Usage

Reason = Literal["stop", "length"]


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] | None = Field(
        None, description="Text or token ids, one or several. Special tokens in text count as such."
    )
    max_tokens: int | None = Field(None, ge=0, description="16 where it is not given.")
    echo: bool | None = Field(None, description="Give the prompt back, in front of the answer.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Log-probabilities, with so many alternatives.")
    best_of: int | None = Field(None, description="Not supported, unless it equals n.")
    suffix: str | None = Field(None, description="Not supported.")


class CompletionLogprobs(AnswerModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(AnswerModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None


class Completion(AnswerModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None = None
