"""Turning the requests of evaluation tasks into token ids, by lm-eval's rules, so that results can be compared.

- The context of a log-likelihood is encoded as a prompt (with the begin token where the checkpoint's tokenizer adds
  one), its trailing spaces moved to the continuation; the continuation is what encoding both adds.
- An empty context becomes the begin token, else the end-of-text token.
- A text as a whole is cut into disjoint windows; the first is predicted from the begin or end-of-text token, and the
  last is moved left, so that it has all the context that fits.
- What is too long loses its left end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmkit.evaluator import Generate, LogLikelihood
from llmkit.tokenizer import Tokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and the continuation to score after it; `truncated`: tokens were cut off to make it fit."""

    context: Ids
    continuation: Ids
    truncated: bool = False


class Encoder:
    """Encodes requests for a model with `context_length` positions."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Raises ValueError where the tokenizer has no token to begin a text with."""
        prefix = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        if prefix is None:
            raise ValueError("the tokenizer has neither a begin nor an end-of-text token, so no text can be scored")
        self.tokenizer, self.context_length, self.prefix = tokenizer, context_length, prefix
        self._last: tuple[str, Ids] = ("", (prefix,))  # the choices of a question share their context

    def pair(self, request: LogLikelihood) -> Pair:
        """Raises ValueError for an empty continuation."""
        context, continuation = request.context, request.continuation
        if not context:
            return self._fitted((self.prefix,), tuple(self.tokenizer.encode(continuation)))
        stripped = context.rstrip()
        spaces = context[len(stripped) :]
        ids = self._context(stripped)
        whole = tuple(self.tokenizer.encode_prompt(stripped + spaces + continuation))
        return self._fitted(whole[: len(ids)], whole[len(ids) :], ids)

    def _context(self, text: str) -> Ids:
        if self._last[0] != text:
            self._last = (text, tuple(self.tokenizer.encode_prompt(text)))
        return self._last[1]

    def _fitted(self, _: Ids, continuation: Ids, context: Ids | None = None) -> Pair:
        raise NotImplementedError

    def prompt(self, request: Generate) -> tuple[Ids, bool]:
        """Ids of a prompt that leaves room for the tokens to generate, and whether it had to be cut."""
        ids = tuple(self.tokenizer.encode_prompt(request.prompt)) or (self.prefix,)
        room = max(self.context_length - request.max_tokens, 1)
        return ids[-room:], len(ids) > room
