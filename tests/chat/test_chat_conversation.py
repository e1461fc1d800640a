"""Conversations: kept whole in a JSON file that other programs read, and read from theirs with one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit_chat.conversation import Conversation
from llmkit_chat.models import Parameters, drop_oldest
from llmkit_chat.repl import changed
from llmkit_chat.screen import split_finished


@given(st.one_of(st.none(), st.text()), st.lists(st.text(), max_size=6))
def test_a_saved_conversation_is_loaded_as_it_was(tmp_path_factory, system, texts):
    path = tmp_path_factory.mktemp("chat") / "saved.json"
    conversation = Conversation(system)
    for number, text in enumerate(texts):
        conversation.ask(text) if number % 2 == 0 else conversation.answer(text)
    conversation.save(path, "a-model")
    assert Conversation.load(path) == conversation
    assert json.loads(path.read_text())["messages"] == conversation.messages


def test_the_messages_of_a_request_are_a_conversation_too(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text('[{"role": "user", "content": "Hello", "name": "x"}, {"role": "assistant", "content": "Hi"}]')
    assert [turn["content"] for turn in Conversation.load(path).turns] == ["Hello", "Hi"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ('{"turns": []}', "is no conversation: it has no list of messages"),
        ('[{"role": "user"}]', "message 1 has no role or no content"),
        ('["Hello"]', "message 1 has no role or no content"),
        ('[{"role": "tool", "content": ""}]', "message 1 has the role 'tool'; there are: system, user, assistant"),
        ('[{"role": "user", "content": []}]', "message 1 has a content that is not text"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "message 2 is a system message"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]', "message 2 is the second in a row"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        Conversation.load(path)
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


def test_a_question_without_an_answer_gives_way_to_the_next() -> None:
    conversation = Conversation()
    conversation.ask("first")
    conversation.ask("second")
    assert [turn["content"] for turn in conversation.turns] == ["second"]


def test_the_oldest_question_goes_with_its_answer_and_the_system_message_stays() -> None:
    conversation = Conversation(
        "be kind", [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd")]
    )
    conversation.ask("e")
    shorter = drop_oldest(conversation.messages)
    assert shorter is not None
    assert [message["content"] for message in shorter] == ["be kind", "c", "d", "e"]
    shortest = drop_oldest(shorter)
    assert shortest is not None
    assert [message["content"] for message in shortest] == ["be kind", "e"]
    assert drop_oldest(shortest) is None


def test_parameters_are_set_and_unset_by_name() -> None:
    parameters = changed(Parameters({}), "temperature 0.25")
    parameters = changed(parameters, "top-k 5")
    assert parameters.sampling(completes=False).temperature == 0.25
    assert parameters.given == {"temperature": 0.25, "top_k": 5}
    assert changed(parameters, "top_k default").given == {"temperature": 0.25}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("temprature 1", "unknown setting 'temprature': did you mean temperature?"),
        ("top_k many", "top_k needs a whole number or `default`, not 'many'"),
        ("top_p 2", "top_p is out of range: 2.0"),
        ("temperature", "temperature needs a number or `default`, not ''"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        changed(Parameters({}), setting)
    assert str(caught.value) == sentence


MARKDOWN = [
    "# A",
    "b *c*",
    "",
    "- d",
    "  - e",
    "1. f",
    "```python",
    "x = 1",
    "",
    "```",
    "| a | b |",
    "|---|---|",
    "> q",
    " ",
]


@given(st.lists(st.sampled_from(MARKDOWN), max_size=14))
def test_finished_blocks_are_cut_off_without_losing_text(lines):
    text = "\n".join(lines)
    finished, tail = split_finished(text)
    assert finished + tail == text


def test_an_open_code_block_is_not_finished_by_an_empty_line() -> None:
    assert split_finished("intro\n\n```\na\n\nb\n") == ("intro\n\n", "```\na\n\nb\n")
