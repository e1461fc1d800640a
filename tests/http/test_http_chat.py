"""/v1/chat/completions and /v1/responses through the openai SDK: conversations, formats, tools, streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from http_support import SECONDS, serving
from openai import AsyncOpenAI, BadRequestError, OpenAI

from llmkit.checkpoint import Checkpoint

HELLO = [{"role": "user", "content": "Tell me of a dog."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 1, "maximum": 9},
        "kind": {"enum": ["dog", "cat"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TIME = {"name": "now"}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, TIME)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def client(tiny_url):
    with OpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def collect(events):
    """The message, finish_reason, log-probabilities and usage that the events of a stream add up to."""
    content, reason, usage = "", None, None
    calls: list[dict[str, str]] = []
    logprobs: list[Any] = []
    for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            assert choice.index == 0 and reason is None
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(calls)
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments
            reason = choice.finish_reason
            logprobs += choice.logprobs.content if choice.logprobs else []
    return content, calls, reason, logprobs, usage


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 3, "logprobs": True, "top_logprobs": 3},
        {"seed": 4, "stop": ["e", "\n"]},
        {"temperature": 0, "response_format": FORMAT},
        {"seed": 5, "tools": TOOLS, "tool_choice": "required"},
        {"seed": 6, "tools": TOOLS, "tool_choice": NAMED},
        {"seed": 7, "tools": TOOLS},
        {"seed": 7, "tools": TOOLS, "tool_choice": "none"},
    ],
)
def test_a_stream_gives_what_the_whole_answer_has(client, options):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 60, **options}
    whole = client.chat.completions.create(**asked)
    content, calls, reason, logprobs, usage = collect(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    message = whole.choices[0].message
    assert content == (message.content or "")
    expected = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert [(call["name"], call["arguments"]) for call in calls] == expected
    assert reason == whole.choices[0].finish_reason
    assert logprobs == (whole.choices[0].logprobs.content if whole.choices[0].logprobs else [])
    assert usage == whole.usage


def test_asynchronous_streams(tiny_url, client):
    asked: Any = {"model": "other-name", "messages": HELLO, "max_tokens": 20, "temperature": 0}

    async def ask():
        async with AsyncOpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0) as asynchronous:
            whole = await asynchronous.chat.completions.create(**asked)
            events = await asynchronous.chat.completions.create(**asked, stream=True)
            return whole, "".join([event.choices[0].delta.content or "" async for event in events])

    whole, text = asyncio.run(ask())
    assert whole.model == "other-name" and text == whole.choices[0].message.content
    assert text == client.chat.completions.create(**{**asked, "model": "tiny"}).choices[0].message.content


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_follows_its_schema(client, seed):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=120, seed=seed, response_format=FORMAT
    )
    value = json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert set(value) == set(SCHEMA["required"])
    assert 1 <= value["age"] <= 9 and value["kind"] in ("dog", "cat") and len(value["name"]) <= 6


def test_json_object_is_an_object_as_far_as_it_goes(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=50, seed=1, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(3))
def test_required_tools_are_called_and_their_arguments_follow_the_schema(client, seed):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 130, "seed": seed, "tools": TOOLS}
    answer = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        assert arguments == {}
    else:
        assert (
            call.function.name == "get_weather" and len(arguments["city"]) <= 8 and set(arguments) <= {"city", "days"}
        )
    named = client.chat.completions.create(**asked, tool_choice=NAMED).choices[0]
    assert [call.function.name for call in named.message.tool_calls] == ["get_weather"]
    assert named.finish_reason == "stop", "as OpenAI's API has it for a tool that the client named"


def test_a_conversation_with_calls_and_their_results_goes_on(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0).choices


def test_a_schema_that_cannot_be_followed_is_a_bad_request(client):
    for schema in ({"type": "nonsense"}, {"type": "string", "pattern": "(?=lookahead)"}, {"$ref": "http://evil/x"}):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(BadRequestError) as error:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, response_format=wanted)
        assert error.value.param == "response_format"
    large = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    with pytest.raises(BadRequestError, match="too large"):
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": large}},
        )


def test_a_template_of_the_request_is_not_taken(tiny_url):
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, "chat_template": "{{ 7 * 7 }}"}
    answer = httpx.post(f"{tiny_url}/v1/chat/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template"


def test_content_that_is_not_text_is_refused(client):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    with pytest.raises(BadRequestError, match="image_url") as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    assert error.value.param == "messages"
    assert client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts[:1]}], max_tokens=2
    ).choices


# --- responses


def test_responses_whole_and_streamed(client):
    asked = {"model": "tiny", "input": "Hello", "instructions": "Be kind.", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**asked, metadata={"a": "b"})
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 12 and whole.metadata == {"a": "b"}
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_responses_call_functions_and_take_their_results(client):
    tools = [{"type": "function", "strict": True, **WEATHER}]
    said = [{"role": "user", "content": [{"type": "input_text", "text": "The weather in Rome?"}]}]
    asked = {"model": "tiny", "tools": tools, "max_output_tokens": 150, "temperature": 0}
    answer = client.responses.create(**asked, input=said, tool_choice={"type": "function", "name": "get_weather"})
    (call,) = answer.output
    assert answer.status == "completed" and call.name == "get_weather" and "city" in json.loads(call.arguments)
    with client.responses.stream(
        **asked, input=said, tool_choice={"type": "function", "name": "get_weather"}
    ) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output[0].arguments == call.arguments
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    asked["max_output_tokens"] = 5
    again = client.responses.create(**asked, input=[*said, call.model_dump(), result], tool_choice="none")
    assert again.output_text


def test_responses_follow_a_schema(client):
    answer = client.responses.create(
        model="tiny",
        input="A dog?",
        max_output_tokens=100,
        text={"format": {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}},
    )
    assert set(json.loads(answer.output_text)) == set(SCHEMA["required"])


def test_responses_are_stateless(client):
    with pytest.raises(BadRequestError) as error:
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"


# --- a real chat model


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    with (
        serving({"smollm2": Checkpoint.open(smollm2_path)}) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_chat_model_is_asked_by_its_own_template(smollm2, smollm2_path):
    from llmkit.chat import render_chat

    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    asked = {"model": "smollm2", "max_tokens": 12, "temperature": 0}
    answer = smollm2.chat.completions.create(**asked, messages=messages)
    assert "Paris" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"
    rendered = render_chat(Checkpoint.open(smollm2_path), messages)
    assert smollm2.completions.create(**asked, prompt=rendered).choices[0].text == answer.choices[0].message.content


@pytest.mark.slow
def test_a_chat_model_calls_a_tool(smollm2):
    answer = smollm2.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=TOOLS[:1],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=60,
        temperature=0,
    )
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"] == "Paris"
