"""/v1/completions through the openai SDK: every parameter, streamed and whole, against the engine itself."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from http_support import SECONDS, stories
from openai import AsyncOpenAI, BadRequestError

from llmkit.engine import GenerateRequest, Sampling
from llmkit_engine.engine import EmbeddedEngine

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine(test_data):
    with EmbeddedEngine.open(stories(test_data)) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(test_data):
    return stories(test_data).tokenizer


def generated(engine, ids, **sampling):
    chunks = list(engine.generate([GenerateRequest(0, tuple(ids), Sampling(**sampling))]))
    return [token for chunk in chunks for token in chunk.tokens], [lp for chunk in chunks for lp in chunk.logprobs]


def test_the_answer_is_the_engines(stories_client, engine, tokenizer):
    answer = stories_client.completions.create(model="stories", prompt=PROMPT, max_tokens=24, temperature=0)
    ids = tokenizer.encode_prompt(PROMPT)
    tokens, _ = generated(engine, ids, max_tokens=24, temperature=0)
    assert PROMPT + answer.choices[0].text == tokenizer.decode(ids[1:] + tokens)  # without the begin token
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 24)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 7},
        {"seed": 3, "n": 3, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "logprobs": 2, "echo": True},
        {"temperature": 0, "echo": True, "n": 2},
        {"temperature": 0, "stop": [" girl", "never"], "logprobs": 0},
        {"temperature": 0, "logit_bias": {"300": 3, "10": -100}},
        {"seed": 1, "extra_body": {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 4}},
    ],
)
def test_a_stream_gives_what_the_whole_answer_has(stories_client, options):
    asked = {"model": "stories", "prompt": [PROMPT, "Lily"], "max_tokens": 30, **options}
    whole = stories_client.completions.create(**asked)
    text = [""] * len(whole.choices)
    reasons = [None] * len(whole.choices)
    logprobs: list[tuple[list[Any], ...]] = [([], [], [], []) for _ in whole.choices]
    usage = None
    for event in stories_client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        for choice in event.choices:
            assert reasons[choice.index] is None, "nothing comes after the finish_reason"
            text[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                given = choice.logprobs
                parts = (given.tokens, given.token_logprobs, given.top_logprobs, given.text_offset)
                for kept, part in zip(logprobs[choice.index], parts):
                    kept.extend(part)
    assert text == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for choice, collected in zip(whole.choices, logprobs):
        if whole_ones := choice.logprobs:
            expected = (whole_ones.tokens, whole_ones.token_logprobs, whole_ones.top_logprobs, whole_ones.text_offset)
            assert collected == expected


def test_samples_have_the_seeds_that_follow(stories_client):
    asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 20}
    several = stories_client.completions.create(**asked, seed=5, n=3)
    for index, choice in enumerate(several.choices):
        alone = stories_client.completions.create(**asked, seed=5 + index)
        assert choice.index == index and choice.text == alone.choices[0].text


def test_echo_with_logprobs_gives_those_of_score(stories_client, engine, tokenizer):
    from llmkit.engine import ScoreRequest

    ids = tokenizer.encode_prompt("Once upon a time, there was a dog.")
    answer = stories_client.completions.create(
        model="stories", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    logprobs = answer.choices[0].logprobs
    (scored,) = engine.score([ScoreRequest(0, tuple(ids[:1]), tuple(ids[1:]))])
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:-1] == pytest.approx(list(scored.logprobs), abs=1e-5)
    greedy = [
        value == max(top.values()) for value, top in zip(logprobs.token_logprobs[1:-1], logprobs.top_logprobs[1:])
    ]
    assert greedy == list(scored.greedy)
    assert len(logprobs.tokens) == len(ids) + 1


def test_text_offsets_point_at_the_tokens(stories_client):
    answer = stories_client.completions.create(
        model="stories", prompt="The cat", max_tokens=20, temperature=0, logprobs=0, echo=True
    )
    text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
    for token, offset in list(zip(logprobs.tokens, logprobs.text_offset))[2:]:
        assert text.startswith(token, offset)


def test_max_tokens_0_with_echo_scores_and_generates_nothing(stories_client, tokenizer):
    answer = stories_client.completions.create(model="stories", prompt="Lily", max_tokens=0, logprobs=1, echo=True)
    assert answer.choices[0].text == "Lily" and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == len(tokenizer.encode_prompt("Lily"))


def test_prompts_come_as_text_ids_and_lists_of_both(stories_client, tokenizer):
    asked = {"model": "stories", "max_tokens": 12, "temperature": 0}
    ids = tokenizer.encode_prompt(PROMPT)
    answers = [
        [choice.text for choice in stories_client.completions.create(**asked, prompt=prompt).choices]
        for prompt in (PROMPT, ids, [PROMPT, "The"], [ids, tokenizer.encode_prompt("The")])
    ]
    assert answers[0] == answers[1] == answers[2][:1] == answers[3][:1]
    assert answers[2] == answers[3]


def test_a_stop_string_is_cut_and_so_are_its_tokens(stories_client):
    asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "logprobs": 0}
    free = stories_client.completions.create(**asked).choices[0].text
    assert " girl" in free
    answer = stories_client.completions.create(**asked, stop=" girl").choices[0]
    assert answer.text == free.partition(" girl")[0] and answer.finish_reason == "stop"
    assert "".join(answer.logprobs.tokens) == answer.text


def test_best_of_and_suffix_are_rejected_clearly(stories_client):
    for name, value in (("best_of", 3), ("suffix", "the end")):
        with pytest.raises(BadRequestError, match="support") as error:
            stories_client.completions.create(model="stories", prompt=PROMPT, **{name: value})
        assert error.value.param == name
    assert stories_client.completions.create(model="stories", prompt=PROMPT, n=2, best_of=2).choices


def test_an_answer_ends_where_the_context_does(stories_client, tokenizer):
    ids = (tokenizer.encode_prompt("Tom and Lily went to the park. ") * 80)[:500]
    answer = stories_client.completions.create(
        model="stories", prompt=ids, max_tokens=100, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"


def test_asynchronous_clients_get_the_answers_that_single_ones_get(stories_url, stories_client):
    prompts = [f"{name} went to the" for name in ("Lily", "Tom", "Ben", "Mom", "Sam", "Anna", "The dog", "A bird")]
    asked = {"model": "stories", "max_tokens": 40, "temperature": 0}
    alone = [stories_client.completions.create(**asked, prompt=prompt).choices[0].text for prompt in prompts]

    async def stream(client, prompt):
        events = await client.completions.create(**asked, prompt=prompt, stream=True)
        return "".join([event.choices[0].text async for event in events])

    async def together():
        async with AsyncOpenAI(base_url=f"{stories_url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts * 4))

    assert asyncio.run(together()) == alone * 4


def test_unknown_fields_are_ignored_with_a_warning(stories_url):
    body = {"prompt": PROMPT, "max_tokens": 1, "frobnicate": 1, "evil\r\nX-Injected: yes": 2}
    answer = httpx.post(f"{stories_url}/v1/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 200
    assert "frobnicate" in answer.headers["warning"] and "x-injected" not in answer.headers


def test_tokens_there_and_back(stories_url, tokenizer):
    text = "Once upon a time, there was a dög."
    ids = httpx.post(
        f"{stories_url}/tokenize", json={"prompt": text, "return_token_strs": True}, timeout=SECONDS
    ).json()
    assert ids["tokens"] == tokenizer.encode_prompt(text) and ids["count"] == len(ids["tokens"]) == len(
        ids["token_strs"]
    )
    back = httpx.post(f"{stories_url}/detokenize", json={"tokens": ids["tokens"]}, timeout=SECONDS).json()
    assert back["prompt"].removeprefix("<s>").strip() == text
