"""Models to talk to: what `llmkit chat` needs of one, and the one that is loaded here (`remote` has the other).

A model streams parts of an answer and checks `cancelled` between them. What no longer fits its context is left out from
the beginning of the conversation, and the first part says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.cli.sampling import TEMPERATURE
from llmkit.engine import Sampling

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.engine import Engine

Messages = Sequence[Mapping[str, str]]

#: tokens of an answer unless --max-tokens says otherwise: small models can go on forever, base models do
MAX_TOKENS_CHAT, MAX_TOKENS_COMPLETION = 1024, 256


@dataclass(frozen=True, slots=True)
class Part:
    """More of an answer. `notice` is a line for the user; `tokens`, where known, how many the answer has so far."""

    text: str = ""
    tokens: int | None = None
    finish_reason: str | None = None
    notice: str = ""


@dataclass(frozen=True)
class Parameters:
    """Sampling parameters that the user gave, by their names in `Sampling`; the model has defaults for the others."""

    given: Mapping[str, Any]
    stop: tuple[str, ...] = ()

    def sampling(self, *, completes: bool) -> Sampling:
        """All parameters. Raises ValueError for one that is out of range."""
        limit = MAX_TOKENS_COMPLETION if completes else MAX_TOKENS_CHAT
        return Sampling(**{"temperature": TEMPERATURE, "max_tokens": limit, **self.given})


class ChatModel(ABC):
    """A model to talk to.

    Attributes:
        name: what to call it.
        completes: whether it continues text, as a base model does, and does not answer.
    """

    name: str
    completes: bool

    @abstractmethod
    def reply(self, messages: Messages, parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        """The answer to a conversation that ends with the user. The last part, and only that, has a finish_reason.

        Raises ValueError where the model cannot answer, with one sentence for the user.
        """

    @abstractmethod
    def complete(self, text: str, parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        """The continuation of a text, in parts as `reply` gives them."""

    @abstractmethod
    def close(self) -> None:
        """Free what the model holds."""


class LocalModel(ChatModel):
    """A checkpoint in an engine of this process."""

    def __init__(self, checkpoint: Checkpoint, engine: Engine, *, completes: bool) -> None:
        from llmkit.generation import TextGenerator

        path = checkpoint.path
        self.name = f"{checkpoint.run.name}/{path.name}" if checkpoint.run else path.name
        self.completes = completes
        self._checkpoint, self._engine = checkpoint, engine
        self._generator = TextGenerator(engine, checkpoint.tokenizer)
        self._ids = itertools.count()
        self._busy = threading.Lock()  # an answer that was interrupted may still be in its last step

    def reply(self, messages: Messages, parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        from llmkit.chat import PLAIN_STOPS, encode_chat

        plain = self._checkpoint.chat_template is None
        if plain:
            parameters = dataclasses.replace(parameters, stop=(*parameters.stop, *PLAIN_STOPS))
        kept, room = messages, self._prompt_room(parameters)
        ids = encode_chat(self._checkpoint, kept, plain=plain)
        while len(ids) > room and (shorter := drop_oldest(kept)):
            kept = shorter
            ids = encode_chat(self._checkpoint, kept, plain=plain)
        if len(ids) >= self._engine.context_length:
            raise ValueError(
                f"the message is too long: with it the conversation has {len(ids)} tokens, and the model's context of "
                f"{self._engine.context_length} has to hold the answer too"
            )
        if left_out := len(messages) - len(kept):
            yield Part(notice=left_out_notice(left_out, f"the model's context of {self._engine.context_length} tokens"))
        yield from self._generate(ids, parameters, cancelled)

    def complete(self, text: str, parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        ids, room = self._checkpoint.tokenizer.encode_prompt(text), self._prompt_room(parameters)
        if cut := max(len(ids) - room, 0):
            yield Part(
                notice=f"the text no longer fits the model's context of {self._engine.context_length} tokens: its "
                f"first {cut} tokens are left out"
            )
        yield from self._generate(ids[cut:], parameters, cancelled)

    def _prompt_room(self, parameters: Parameters) -> int:
        """How many tokens of the context a prompt may take: an answer gets a quarter, or all it is allowed if less."""
        context = self._engine.context_length
        allowed = parameters.sampling(completes=self.completes).max_tokens
        return max(context - min(allowed, max(context // 4, 1)), 1)

    def _generate(self, ids: Sequence[int], parameters: Parameters, cancelled: threading.Event) -> Iterator[Part]:
        from llmkit.generation import TextRequest

        sampling = parameters.sampling(completes=self.completes)
        request = TextRequest(next(self._ids), tuple(ids), sampling, stop=parameters.stop)
        with self._busy:
            for piece in self._generator.stream([request]):
                if cancelled.is_set() and piece.finish_reason is None:
                    self._generator.cancel(request.id)
                yield Part(piece.text, piece.tokens, piece.finish_reason)

    def close(self) -> None:
        with self._busy:
            self._engine.close()


def drop_oldest(messages: Messages) -> Messages | None:
    """The conversation without its oldest question and answer, the system message kept; None where only one is left."""
    first = 1 if messages[0]["role"] == "system" else 0
    for index in range(first + 1, len(messages)):
        if messages[index]["role"] == "user":
            return [*messages[:first], *messages[index:]]
    return None


def left_out_notice(count: int, context: str) -> str:
    """The line for the user when the oldest `count` messages are not given to the model."""
    what = "message is" if count == 1 else f"{count} messages are"
    return f"the conversation no longer fits {context}: the oldest {what} left out"
