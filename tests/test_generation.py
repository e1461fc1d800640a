"""Text around an engine: characters stay whole, stop strings end samples, seeds repeat; and chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.chat import encode_chat, render_chat
from llmkit.checkpoint import Checkpoint
from llmkit.engine import Chunk, Engine, GenerateRequest, Sampling, ScoreRequest, ScoreResult
from llmkit.generation import Detokenizer, StopStrings, TextGenerator, TextRequest, complete
from llmkit.testing.tiny import tiny_checkpoint
from llmkit.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")


class Script(Engine):
    """Generates a given text, `step` byte tokens a chunk, for requests in turns."""

    name = "script"
    vocab_size, context_length, eos_ids, dtype = BYTES.vocab_size, 10_000, frozenset[int](), "fp32"

    def __init__(self, text: str, step: int = 1) -> None:
        self.ids, self.step = BYTES.encode(text), step
        self.cancelled: set[int] = set()
        self.seeds: list[int | None] = []

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        raise NotImplementedError

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        raise NotImplementedError

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        running = list(requests)
        self.seeds = [request.sampling.seed for request in running]
        for start in range(0, len(self.ids), self.step):
            for request in list(running):
                if request.id in self.cancelled:
                    running.remove(request)
                    yield Chunk(request.id, (), finish_reason="cancelled")
                    continue
                end = start + self.step
                last = end >= len(self.ids)
                yield Chunk(request.id, tuple(self.ids[start:end]), finish_reason="length" if last else None)

    def cancel(self, request_id: int) -> None:
        self.cancelled.add(request_id)


@given(st.text(max_size=30), st.integers(1, 5))
@settings(deadline=None)
def test_pieces_make_the_text_and_never_split_a_character(text: str, step: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    ids = BYTES.encode(text)
    detokenizer = Detokenizer(BYTES, (BYTES.encode("x")[0],))
    pieces = [detokenizer.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + detokenizer.finish() == text


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.add(BYTES.encode("é")[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_and_padding_ids_give_no_text() -> None:
    special = next(iter(BYTES.special_tokens.values()))
    assert Detokenizer(BYTES).add([*BYTES.encode("a"), special, BYTES.vocab_size + 5, *BYTES.encode("b")]) == "ab"


def test_a_space_in_front_is_kept_within_a_text(test_data: Path) -> None:
    tokenizer = load_tokenizer(test_data / "models" / "stories260k-hf")
    ids = tokenizer.encode("Once upon a time")
    assert Detokenizer(tokenizer, ids[:1]).add(ids[1:]) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
    assert Detokenizer(tokenizer, [tokenizer.special_tokens["<s>"]]).add(ids) == "Once upon a time"


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    complete_at = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if complete_at:
        end = complete_at[0]
        expected = min((text[: end - len(stop)] for stop in stops if text[:end].endswith(stop)), key=len)
    watcher, seen, found = StopStrings(stops), "", False
    for piece in pieces:
        more, found = watcher.add(piece)
        seen += more
        assert expected.startswith(seen), "text was shown that belongs to a stop string"
        if found:
            break
    assert seen + ("" if found else watcher.finish()) == expected
    assert found == bool(complete_at)


def test_text_that_begins_no_stop_string_is_not_held_back() -> None:
    assert StopStrings(["\nUser:"]).add("hello\nUs") == ("hello", False)
    assert StopStrings(["\nUser:"]).add("hello\nUx") == ("hello\nUx", False)


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_stop_string_ends_a_sample_and_cancels_its_request(step: int) -> None:
    engine = Script("one two three four", step)
    request = TextRequest(7, (1,), stop=("three", "four"))
    (done,) = complete(engine, BYTES, [request])
    assert (done.id, done.text, done.finish_reason) == (7, "one two ", "stop")
    assert len(engine.cancelled) == (0 if step == 100 else 1)


def test_held_back_text_comes_with_the_end() -> None:
    (done,) = complete(Script("he has i"), BYTES, [TextRequest(0, (1,), stop=("it",))])
    assert (done.text, done.finish_reason, done.tokens) == ("he has i", "length", 8)


def test_samples_have_seeds_in_sequence() -> None:
    engine = Script("ab")
    done = list(complete(engine, BYTES, [TextRequest(0, (1,), Sampling(seed=40), n=3)]))
    assert engine.seeds == [40, 41, 42]
    assert sorted((sample.sample, sample.seed) for sample in done) == [(0, 40), (1, 41), (2, 42)]


def test_cancelling_ends_all_samples_of_a_request() -> None:
    generator = TextGenerator(Script("abcdef"), BYTES)
    reasons = {}
    for piece in generator.stream([TextRequest(0, (1,), n=2), TextRequest(1, (1,))]):
        if piece.id == 0 and piece.sample == 1 and not piece.finish_reason:
            generator.cancel(0)
        if piece.finish_reason:
            reasons[piece.id, piece.sample] = piece.finish_reason
    assert reasons == {(0, 0): "cancelled", (0, 1): "cancelled", (1, 0): "length"}


def test_two_generators_can_share_an_engine() -> None:
    engine = Script("abc")
    first = TextGenerator(engine, BYTES).stream([TextRequest(0, (1,))])
    next(first)
    assert [c.text for c in complete(engine, BYTES, [TextRequest(0, (1,))])] == ["abc"]
    assert "".join(piece.text for piece in first) == "bc"


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="n is out of range"):
        TextRequest(0, (1,), n=0)
    with pytest.raises(ValueError, match="stop string is empty"):
        TextRequest(0, (1,), stop=("",))


# --- chat templates

CHATML = (
    "{%- for message in messages %}\n"
    "    {% if message.role == 'bad' %}{{ raise_exception('no role ' + message.role) }}{% endif %}\n"
    "<|im_start|>{{ message.role }}\n"
    "{% generation %}{{ message.content | trim }}{% endgeneration %}<|im_end|>\n"
    "{% if loop.index > 5 %}{% break %}{% endif %}\n"
    "{%- endfor %}\n"
    "{{ {'<a>': 'é'} | tojson }} {{ bos_token }} {{ strftime_now('%Y') | length }} {{ tools | tojson }}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "<Hi> & é"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture
def chat_checkpoint(tmp_path: Path) -> Checkpoint:
    checkpoint = tiny_checkpoint(tmp_path / "chat")
    (checkpoint.path / "chat_template.jinja").write_text(CHATML, "utf-8")
    return checkpoint


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_template_renders_as_in_transformers(
    chat_checkpoint: Checkpoint, prompt: bool, tools: Sequence[dict[str, object]] | None
) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(chat_checkpoint.path)
    expected = reference.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(chat_checkpoint, MESSAGES, tools=tools, add_generation_prompt=prompt) == expected
    ids = reference.apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=prompt, return_dict=False)
    assert encode_chat(chat_checkpoint, MESSAGES, tools=tools, add_generation_prompt=prompt) == ids


def test_a_template_can_refuse(chat_checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="refuses this conversation: no role bad"):
        render_chat(chat_checkpoint, [{"role": "bad", "content": ""}])


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% if %}", "{{ 1 + '' }}"]
)
def test_a_hostile_or_broken_template_is_an_error(chat_checkpoint: Checkpoint, template: str) -> None:
    (chat_checkpoint.path / "chat_template.jinja").write_text(template, "utf-8")
    with pytest.raises(ValueError, match="chat template"):
        render_chat(chat_checkpoint, MESSAGES)


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        render_chat(tiny_checkpoint(tmp_path / "base"), MESSAGES)


@pytest.fixture
def smollm2(smollm2_path: Path) -> Checkpoint:
    return Checkpoint.open(smollm2_path)


@pytest.mark.slow
def test_a_real_template_renders_as_in_transformers(smollm2: Checkpoint) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2.path)
    for messages in (MESSAGES, MESSAGES[1:], [*MESSAGES, {"role": "assistant", "content": "Hello!"}, MESSAGES[1]]):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_chat(smollm2, messages) == expected
        assert encode_chat(smollm2, messages) == reference.encode(expected, add_special_tokens=False)


@pytest.mark.slow
def test_a_chat_model_knows_paris(smollm2: Checkpoint) -> None:
    from llmkit.engines import open_engine

    prompt = encode_chat(smollm2, [{"role": "user", "content": "What is the capital of France?"}])
    with open_engine(smollm2, "transformers") as engine:
        request = TextRequest(0, tuple(prompt), Sampling(temperature=0, max_tokens=16))
        (done,) = complete(engine, smollm2.tokenizer, [request])
    assert "Paris" in done.text
    assert done.finish_reason == "stop"
