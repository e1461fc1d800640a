"""What requests and answers have in common, and those of the smaller endpoints, for the OpenAPI document too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llmkit.engine import Sampling

Probability = Annotated[float, Field(gt=0, le=1)]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class RequestModel(BaseModel):
    """A request. Fields that it does not know are kept in `model_extra`, to be named in a warning."""

    model_config = ConfigDict(extra="allow", strict=True)


class AnswerModel(BaseModel):
    """An answer; also the description of one in the OpenAPI document."""

    model_config = ConfigDict(extra="forbid")


def _stop_strings(value: str | list[str] | None) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if "" in stops:
        raise ValueError("stop: a stop string is empty")
    if len(stops) > 16:
        raise ValueError("stop: at most 16 stop strings are taken")
    return stops


def _bias(value: dict[str, float] | None) -> dict[str, float]:
    for key, bias in (value or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"logit_bias: its keys are token ids, not {key[:40]!r}")
        if not -100 <= bias <= 100:
            raise ValueError(f"logit_bias: a bias is between -100 and 100, not {bias}")
    return value or {}


class StreamOptions(RequestModel):
    include_usage: bool = Field(False, description="Send an event with the usage before the end.")


class SamplingFields(RequestModel):
    """How tokens are chosen: OpenAI's fields, and those beyond that vLLM and others take too."""

    model: str | None = Field(None, description="One of /v1/models; the server's first where none is named.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy.")
    top_p: Probability | None = None
    n: int | None = Field(None, ge=1, description="Answers to a prompt; their seeds are seed, seed + 1, ...")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[str | list[str] | None, AfterValidator(_stop_strings)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_bias)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)

    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return _stop_strings(self.stop)

    def sampling(self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> Sampling:
        """The engine's parameters. `max_tokens` is at least 1."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=min(self.min_tokens or 0, max_tokens),
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class ErrorDetail(AnswerModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(AnswerModel):
    error: ErrorDetail


#: the errors of every endpoint, for the OpenAPI document
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "A parameter is wrong, or the prompt too long",
        401: "No key, or a wrong one",
        403: "The Host header names another machine",
        404: "No such model",
        408: "The body did not come",
        413: "The body is too large",
        429: "Too many generations; Retry-After says when to come again",
        500: "The server failed",
        503: "Not ready yet, or ending; Retry-After says when to come again",
    }.items()
}


class Usage(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ModelCard(AnswerModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["llmkit"] = "llmkit"
    max_model_len: int = Field(description="The context length: prompt and answer together, in tokens.")
    has_chat_template: bool = Field(description="False for a base model, which continues text.")


class ModelList(AnswerModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(AnswerModel):
    status: Literal["ready", "loading", "draining", "failed"]
