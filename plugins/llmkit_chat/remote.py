"""RemoteModel: a model behind an OpenAI-compatible server, ours or another one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from llmkit.component import nearest
from llmkit_chat.models import (
    MAX_TOKENS_COMPLETION,
    ChatModel,
    Messages,
    Parameters,
    Part,
    drop_oldest,
    left_out_notice,
)

if TYPE_CHECKING:
    import openai

#: parameters that the openai package has no argument for; vLLM, llama-server and ours take them
EXTENSIONS = ("top_k",)


class RemoteModel(ChatModel):
    """One model of a server, which is asked anew with the whole conversation each time."""

    def __init__(self, url: str, model: str | None, api_key: str | None, *, completes: bool | None) -> None:
        """Find the model on the server; None takes the only one. Raises ValueError where that fails.

        `completes` None asks the server, whose list says `"has_chat_template": false` for a base model if it is ours.
        """
        import openai

        self.url = base_url(url)
        # Without a key the package would send the one in OPENAI_API_KEY, which is none of this server's business.
        self._client = openai.OpenAI(base_url=self.url, api_key=api_key or "none")
        served = self._served()
        if model is None:
            if len(served) != 1:
                raise ValueError(
                    f"{self.url} serves {len(served)} models: choose one with --model ({', '.join(served)})"
                )
            (model,) = served
        elif served and model not in served:
            raise ValueError(f"{self.url} serves no model {model!r}: {nearest(model, served)}")
        self.name = model
        self.completes = served.get(model) is False if completes is None else completes

    def _served(self) -> dict[str, bool | None]:
        """The models that the server lists, each with what it says about chat."""
        with self._errors():
            return {
                model.id: (model.model_extra or {}).get("has_chat_template") for model in self._client.models.list()
            }
        return {}

    def reply(self, messages: Messages, parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        kept = messages

        def ask() -> Any:
            return self._client.chat.completions.create(
                model=self.name, messages=cast(Any, kept), **self._arguments(parameters)
            )

        while True:
            try:
                for part in self._stream(ask, lambda choice: choice.delta.content, cancelled):
                    if len(kept) < len(messages):
                        yield Part(notice=left_out_notice(len(messages) - len(kept), "the model's context"))
                        messages = kept
                    yield part
                return
            except ContextExceeded:
                if (shorter := drop_oldest(kept)) is None:
                    raise
                kept = shorter

    def complete(self, text: str, parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        # OpenAI's default for completions is 16 tokens, which servers follow
        arguments = {"max_tokens": MAX_TOKENS_COMPLETION, **self._arguments(parameters)}

        def ask() -> Any:
            return self._client.completions.create(model=self.name, prompt=text, **arguments)

        yield from self._stream(ask, lambda choice: choice.text, cancelled)

    def _arguments(self, parameters: Parameters) -> dict[str, Any]:
        """Of the sampling parameters only those that the user gave: the server knows its models' defaults."""
        arguments = {name: value for name, value in parameters.given.items() if name not in EXTENSIONS}
        if extra := {name: value for name, value in parameters.given.items() if name in EXTENSIONS}:
            arguments["extra_body"] = extra
        if parameters.stop:
            arguments["stop"] = list(parameters.stop)
        return {**arguments, "stream": True, "stream_options": {"include_usage": True}}

    def _stream(
        self, ask: Callable[[], Any], text_of: Callable[[Any], str | None], cancelled: threading.Event
    ) -> Iterator[Part]:
        """The parts of one streamed response, whose choices hold their text where `text_of` finds it."""
        finish_reason, tokens = None, None
        with self._errors(), ask() as stream:
            for event in stream:
                if cancelled.is_set():
                    return
                if event.usage:
                    tokens = event.usage.completion_tokens
                for choice in event.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if text := text_of(choice):
                        yield Part(text)
        if finish_reason is None:
            raise ValueError(f"{self.url} ended the connection in the middle of the answer")
        yield Part(tokens=tokens, finish_reason=finish_reason)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong with the server as a ValueError of one sentence."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            if exceeds_context(error):
                raise ContextExceeded(server_message(error)) from None
            hint = ""
            if error.status_code in (401, 403):
                hint = "; --api-key-env NAME takes a key from the environment variable NAME"
            raise ValueError(f"{self.url}: {server_message(error)}{hint}") from None
        except openai.APIConnectionError as error:
            reason = f" ({error.__cause__})" if error.__cause__ else ""
            raise ValueError(
                f"cannot reach {self.url}, or the connection broke{reason}: is the server running?"
            ) from None
        except openai.OpenAIError as error:
            raise ValueError(f"{self.url}: {error}") from None

    def close(self) -> None:
        self._client.close()


class ContextExceeded(ValueError):
    """The server says that the conversation is longer than the model's context."""


def base_url(url: str) -> str:
    """The address that the API's paths stand under: `http://host:8000` means `http://host:8000/v1`."""
    url = url.rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--url {url} is no address: it should look like http://127.0.0.1:8000")
    return url if parts.path else f"{url}/v1"


def exceeds_context(error: openai.APIStatusError) -> bool:
    """Did the server refuse the conversation for its length? Servers say that in their own ways."""
    if error.status_code not in (400, 413, 422):
        return False
    words = f"{error.code} {error.type} {error.message}".lower()
    return "context_length" in words or "context length" in words or "context_size" in words


def server_message(error: openai.APIStatusError) -> str:
    """The server's own sentence, out of OpenAI's envelope where it uses that."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return f"{error.status_code} {error.response.reason_phrase}"
