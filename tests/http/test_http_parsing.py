"""Reading an answer as it comes: tool calls and log-probabilities do not depend on how the text is cut."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from llmkit_http.tools import CallArguments, CallBegin, TextDelta, ToolParser

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(max_size=8), values, max_size=3)
texts = st.text(max_size=20).filter(lambda text: "<tool_call>" not in text)


def parse(pieces):
    """The text and the calls of an answer that comes in pieces."""
    parser = ToolParser()
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    calls = [[delta.name, ""] for delta in deltas if isinstance(delta, CallBegin)]
    for delta in deltas:
        if isinstance(delta, CallArguments):
            calls[delta.index][1] += delta.text
    return text, calls


def cut(text, at):
    """The text in pieces that end at some places."""
    places = sorted({min(place, len(text)) for place in at} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(texts, st.lists(st.tuples(st.text("abc_", min_size=1), arguments), min_size=1, max_size=3), st.data())
def test_calls_are_found_however_the_text_is_cut(before, calls, data):
    whole = before + "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(given)}}}\n</tool_call>'
        for name, given in calls
    )
    pieces = cut(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    text, found = parse(pieces)
    assert text == before.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(st.text('<tool_cal>/{}": namergs\n', max_size=60), st.data())
def test_no_text_is_lost_that_is_no_call(text, data):
    pieces = cut(text, data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    found, calls = parse(pieces)
    if not calls:
        assert found.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_what_only_looks_like_a_call_stays_text():
    for text in (
        "<tool_call>hello",
        '<tool_call>\n{"nome": 1}\n</tool_call>',
        "a <tool",
        "<tool_call>\n{'name'}</tool_call> b",
    ):
        assert parse([text]) == (text, [])
        assert parse(list(text)) == (text, [])


def test_a_call_that_is_cut_off_keeps_what_there_is():
    assert parse(['<tool_call>\n{"name": "f", "arguments": {"a": [1, ']) == ("", [["f", '{"a": [1, ']])
