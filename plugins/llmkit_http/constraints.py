"""Constraints: limits an answer to a JSON schema or to tool calls, through llguidance.

llguidance computes the mask of each step in Rust from a grammar and the tokens' bytes, in well below a millisecond. It
is one wheel without dependencies; xgrammar would bring PyTorch, and outlines-core compiles a schema for seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from llmkit.engine import Engine
from llmkit.tokenizer import Tokenizer
from llmkit_http.errors import bad_request
from llmkit_http.tools import CALL_BEGIN, CALL_END

MAX_SCHEMA = 2**16  # characters of a grammar: time and memory of compiling one grow with it
# One way to write each value. Where white space is free, a weak model writes it until its tokens are used up.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
MAX_CALLS = 16  # in one answer; a weak model would repeat the first until its tokens are used up


class Grammars:
    """Makes constraints for one model. The first one takes a while: the tokenizer's bytes are made into a trie."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine) -> None:
        """Raises APIError where the model has no end token, since a constrained answer could not end."""
        if not engine.eos_ids:
            raise bad_request("The model has no end token, so an answer of it cannot be held to a format.")
        self._vocab = engine.vocab_size
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, engine)), n_vocab=self._vocab, eos_token=sorted(engine.eos_ids)
        )

    def check(self, grammar: str, param: str) -> None:
        """Raise APIError, naming the parameter, unless the grammar can be used."""
        if len(grammar) > MAX_SCHEMA:
            raise bad_request(f"{param}: it is too large: at most {MAX_SCHEMA} characters are taken", param)
        if reason := LLMatcher(self._tokenizer, grammar, log_level=0).get_error():
            raise bad_request(f"{param}: this schema is not supported: {reason.strip().splitlines()[0][:300]}", param)

    def constraint(self, grammar: str) -> GrammarConstraint:
        """A constraint for one generation."""
        return GrammarConstraint(LLMatcher(self._tokenizer, grammar, log_level=0), self._vocab)


class GrammarConstraint:
    """The constraint of one generation: follows its tokens, and masks what the grammar does not allow next."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab
        self._taken = 0
        self._bits = allocate_token_bitmask(1, vocab)

    def __call__(self, tokens: tuple[int, ...]) -> npt.NDArray[Any]:
        """The mask, (V,) booleans, after `tokens`. Raises ValueError where the grammar is too hard to follow."""
        if not self._matcher.consume_tokens(list(tokens[self._taken :])):
            raise ValueError(f"the format cannot be followed: {self._matcher.get_error().splitlines()[0]}")
        self._taken = len(tokens)
        fill_next_token_bitmask(self._matcher, self._bits)
        return np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little", count=self._vocab).view(np.bool_)


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine) -> None:
        self.eos_token_id = min(engine.eos_ids)
        self.bos_token_id = tokenizer.bos_id
        padding = engine.vocab_size - tokenizer.vocab_size
        self.tokens = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)] + [b""] * padding
        self.special_token_ids = sorted(set(tokenizer.special_tokens.values()) | engine.eos_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def json_rule(schema: Mapping[str, Any]) -> str:
    """The grammar of a JSON value that follows `schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def answer_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of an answer that is one JSON value."""
    return f"start: {json_rule(schema)}\n"


def tool_grammar(
    tools: Mapping[str, Mapping[str, Any] | None],
    *,
    required: bool,
    several: bool,
    schema: Mapping[str, Any] | None = None,
) -> str:
    """The grammar of an answer with calls of `tools`, name -> schema of its arguments.

    Not `required`, the answer may be text too, with calls behind it, or one JSON value where there is a `schema`.
    """
    quoted = json.dumps
    heads = [f'"\\"{name}\\", \\"arguments\\": " {json_rule(tools[name] or NO_ARGUMENTS)}' for name in tools]
    rules = [f"call_{index}: {head}" for index, head in enumerate(heads)]
    which = " | ".join(f"call_{index}" for index in range(len(heads)))
    rules.append(f"""body: "\\n{{\\"name\\": " ({which}) {quoted("}" + chr(10) + CALL_END)}""")
    rules.append(f"call: {quoted(CALL_BEGIN)} body")
    calls = "call" + (' ("\\n" call)*' if several else "")
    if required:
        rules.insert(0, f"start: {calls}")
    elif schema is not None:
        rules.insert(0, f"start: {calls} | {json_rule(schema)}")
    else:
        # The text before a call is lazy: it ends where the call's tag is complete.
        rules.insert(0, f"start: noticed{{0,{MAX_CALLS}}} rest" if several else "start: noticed | rest")
        rules += ["noticed: tag body", f"tag[lazy]: TEXT {quoted(CALL_BEGIN)}", "rest: TEXT", r"TEXT: /(.|\n)*/"]
        rules.remove(f"call: {quoted(CALL_BEGIN)} body")
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


def names_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any] | None]:
    """Name -> parameters of functions as requests give them."""
    return {tool["name"]: tool.get("parameters") for tool in tools}
