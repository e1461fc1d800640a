"""What goes to a completions endpoint and comes back: connecting, fields, log-probabilities, token ids."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.engine import Chunk, FinishReason, GenerateRequest, Sampling, ScoreRequest, ScoreResult
from llmkit.generation import Detokenizer
from llmkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRIES = 6  # with pauses that double from half a second up to eight
TIMEOUT = 600.0  # seconds for one answer: a loaded server makes requests wait
TOKEN_ID = "token_id:"  # how vLLM writes a token where ids are asked for


class EndpointError(RuntimeError):
    """The endpoint cannot be reached, refuses a request, or answers otherwise than the protocol says."""


class RemoteModel(NamedTuple):
    """A model of the endpoint. `created` changes when a server of one's own is started again with another model."""

    id: str
    created: int


def connect(url: str | None, model: str | None) -> tuple[Any, RemoteModel, int | None]:
    """A client, the model, and the most tokens that the endpoint takes, where it says so.

    Raises ValueError for a URL or a model that is missing, and EndpointError for an endpoint that does not answer.
    """
    import openai

    url = url or os.environ.get("OPENAI_BASE_URL")
    if not url:
        raise ValueError("engine 'openai' needs the endpoint's address: --engine-url http://host:port/v1")
    key = os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own want none, the library does
    try:
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        served = {item.id: item for item in client.with_options(max_retries=2).models.list()}
    except (openai.OpenAIError, ValueError) as error:
        raise EndpointError(f"the models of {url} cannot be listed: {_reason(error)}") from error
    if model is None and len(served) != 1:
        raise ValueError(f"{url} serves {len(served)} models: choose one with --engine-model ({_some(served)})")
    if model is None:
        (model,) = served
    if model not in served:
        raise ValueError(f"{url} serves no model {model!r}: it has {_some(served)}")
    found = served[model]
    limit = (found.model_extra or {}).get("max_model_len")
    return client, RemoteModel(model, int(found.created or 0)), limit if isinstance(limit, int) else None


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)[:10]) + (", …" if len(names) > 10 else "") if names else "none"


def call(client: Any, **fields: Any) -> Any:
    """`completions.create`. Raises EndpointError with what the endpoint said."""
    import openai

    try:
        return client.completions.create(**fields)
    except openai.OpenAIError as error:
        raise EndpointError(f"the endpoint {client.base_url} does not answer: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One sentence of an error of the client library."""
    import openai

    if isinstance(error, openai.AuthenticationError):
        return "it wants a key in the environment variable OPENAI_API_KEY"
    if isinstance(error, openai.APITimeoutError):
        return f"it took longer than {TIMEOUT:.0f} s"
    if isinstance(error, openai.APIConnectionError):
        return f"no connection ({error.__cause__ or error})"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def scores(request: ScoreRequest, choice: Any) -> ScoreResult:
    """The log-probabilities of a continuation from a prompt that came back with those of its tokens."""
    given = choice.logprobs
    if given is None or not given.token_logprobs or not given.top_logprobs:
        raise EndpointError(
            "the endpoint gives no log-probabilities of a prompt (echo with logprobs), which scoring needs; "
            "tasks that generate work without"
        )
    first, end = len(request.context), len(request.context) + len(request.continuation)
    logprobs, top = given.token_logprobs[first:end], given.top_logprobs[first:end]
    if len(logprobs) < end - first or any(value is None for value in logprobs):
        raise EndpointError(
            f"the endpoint gave log-probabilities of {len(given.token_logprobs)} tokens for a prompt of {end}: "
            "it does not take prompts as token ids"
        )
    greedy = tuple(value >= max((best or {}).values(), default=value) for value, best in zip(logprobs, top))
    return ScoreResult(request.id, tuple(map(float, logprobs)), greedy)


def sampling_fields(sampling: Sampling, *, max_tokens: int) -> dict[str, Any]:
    """Fields of a request that generates: OpenAI's, and of vLLM's those that are asked for and OpenAI has not."""
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.presence_penalty:
        fields["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        fields["frequency_penalty"] = sampling.frequency_penalty
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): value for token, value in sampling.logit_bias.items()}
    fields["logprobs"] = sampling.logprobs or 0  # where ids are written, they stand there
    extra: dict[str, Any] = {"return_tokens_as_token_ids": True}
    default = Sampling()
    for name in ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"):
        if (value := getattr(sampling, name)) != getattr(default, name):
            extra[name] = value
    if sampling.stop_token_ids:
        extra["stop_token_ids"] = list(sampling.stop_token_ids)
    return {**fields, "extra_body": extra}


class Reply:
    """Turns the events of one streamed answer into chunks.

    Token ids are the endpoint's where it writes them. Where it does not, its text is encoded when it is complete; that
    text is the same, whatever the tokens were.
    """

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._ends = eos_ids | frozenset(request.sampling.stop_token_ids)
        self._text: list[str] = []
        self._ids = False  # whether the endpoint writes them
        self._reason: FinishReason | None = None

    def add(self, choice: Any) -> Chunk | None:
        """What an event adds; the finish_reason is left to `finish`."""
        if choice.finish_reason:
            self._reason = "length" if choice.finish_reason == "length" else "stop"
        written = choice.logprobs.tokens if choice.logprobs and choice.logprobs.tokens else []
        if not all(token.startswith(TOKEN_ID) for token in written) or not (written or self._ids):
            self._text.append(choice.text)
            return None
        self._ids = True
        ids = [_token_id(token) for token in written]
        if self._reason == "stop" and ids and ids[-1] in self._ends:
            ids.pop()
        if not ids:
            return None
        if self._request.sampling.logprobs is None:
            return Chunk(self._request.id, tuple(ids))
        top = [{_token_id(token): value for token, value in best.items()} for best in choice.logprobs.top_logprobs]
        kept = [_likeliest(best, self._request.sampling.logprobs) for best in top]
        return Chunk(
            self._request.id, tuple(ids), tuple(choice.logprobs.token_logprobs[: len(ids)]), tuple(kept[: len(ids)])
        )

    def finish(self) -> Chunk:
        """The last chunk. Raises EndpointError for an answer that broke off, or that lacks the ids that are needed."""
        if self._reason is None:
            raise EndpointError(f"request {self._request.id}: the endpoint's answer broke off")
        if self._ids:
            return Chunk(self._request.id, (), finish_reason=self._reason)
        if self._request.sampling.logprobs is not None:
            raise EndpointError("the endpoint writes tokens as text, so their log-probabilities cannot be given by id")
        ids = encode_continuation(self._tokenizer, self._request.prompt, "".join(self._text))
        return Chunk(self._request.id, ids, finish_reason=self._reason)


def encode_continuation(tokenizer: Tokenizer, prompt: tuple[int, ...], text: str) -> tuple[int, ...]:
    """Ids that read as `text` behind the prompt. Tokenizers that put a space in front of a text must not do so here.

    Raises EndpointError for a text that no tokens of the model are.
    """
    for anchor in ("", "\n", "a", "."):
        ids = tokenizer.encode(anchor + text)[len(tokenizer.encode(anchor)) :]
        detokenizer = Detokenizer(tokenizer, prompt)
        if detokenizer.add(ids) + detokenizer.finish() == text:
            return tuple(ids)
    raise EndpointError(f"the endpoint wrote {text[:40]!r}, which the checkpoint's tokenizer cannot write")


def _token_id(token: str) -> int:
    return int(token.removeprefix(TOKEN_ID))


def _likeliest(values: dict[int, float], count: int) -> dict[int, float]:
    """The `count` likeliest; servers add the token that was chosen."""
    return dict(sorted(values.items(), key=lambda item: -item[1])[:count])
