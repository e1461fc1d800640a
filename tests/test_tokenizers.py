"""Tokenizers: the same ids through tiktoken, tokenizers and transformers, and the same text back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.bpe import SPLITS, ByteLevelBPE, recover_merge
from llmkit.hf_tokenizer import HFTokenizer
from llmkit.plugins import UnknownComponent, get_plugins
from llmkit.testing.data import TokenizerContract
from llmkit.tokenizer import END_OF_TEXT, Tokenizer, TokenizerProvider, load_tokenizer

SAMPLE = """The cat isn't here; it's over there. I'LL see you'D IT'S 'Twas don’t ſ'ſ 'ſo
def f(x):\r\n    return x ** 2  # 12345 6789\n\n\n\tif x:   \n  y = "naïve café" \u3000日本語テスト 안녕 Привет мир
   trailing spaces   \n\n<|endoftext|>and <|a|> <|unk|>\x00\x7f 🎉👩‍👩‍👧 e\u0301 ١٢٣ ½ ²"""

characters_of_utf8 = st.characters(exclude_categories=["Cs"])  # surrogates do not occur in UTF-8
pieces = st.sampled_from(
    ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "<|endoftext|>", "123", "'ſ", "　", "\u0085", "don't"]
)
texts = st.lists(st.one_of(st.text(characters_of_utf8, max_size=8), pieces), max_size=12).map("".join)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def real_text(test_data: Path) -> str:
    import pyarrow.parquet as pq

    novels = pq.read_table(test_data / "text" / "novels" / "val.parquet")["text"].to_pylist()
    shakespeare = (test_data / "text" / "tinyshakespeare" / "input.txt").read_text("utf-8")
    return SAMPLE + shakespeare[:300_000] + "".join(novels)[:700_000]


@pytest.fixture(scope="session")
def tiktoken_cache(test_data: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = test_data / "tokenizers" / "tiktoken_cache"
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


def corpus() -> list[str]:
    source = Path(__file__).parents[1] / "llmkit"
    return [path.read_text("utf-8") for path in sorted(source.rglob("*.py"))]


@pytest.fixture(scope="session")
def trained() -> ByteLevelBPE:
    return ByteLevelBPE.train(corpus(), 1500, ["<|a|>"])


@pytest.fixture(scope="session")
def trained_folder(trained: ByteLevelBPE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    trained.save(folder)
    return folder


def hf_ids(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text).input_ids
    return ids


# --- byte-level BPE


def test_training_puts_bytes_first_and_special_tokens_last(trained: ByteLevelBPE) -> None:
    assert trained.vocab_size == 1500
    assert trained.special_tokens == {END_OF_TEXT: 1498, "<|a|>": 1499}
    assert trained.eot_id == 1498
    assert trained.bos_id is None
    assert [trained.decode_bytes([index]) for index in range(256)] == [bytes([byte]) for byte in range(256)]


def test_training_is_repeatable(trained: ByteLevelBPE) -> None:
    assert ByteLevelBPE.train(iter(corpus()), 1500, ["<|a|>"]).fingerprint == trained.fingerprint


@pytest.mark.parametrize("split", SPLITS)
def test_every_trained_token_is_reached_through_its_merge(split: str) -> None:
    tokenizer = ByteLevelBPE.train(corpus(), 1200, [], split=split)
    assert all(len(recover_merge(tokenizer.ranks, token)) == 2 for token in tokenizer.ranks if len(token) > 1)


def test_training_on_too_little_text_gives_a_smaller_vocabulary() -> None:
    tokenizer = ByteLevelBPE.train(["aaab aaab"], 5000, [])
    assert 257 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("aaab ü")) == "aaab ü"


@pytest.mark.parametrize(
    ("texts", "size", "special", "message"),
    [
        (["text"], 256, [], "too small"),
        ([], 300, [], "no text"),
        (["text"], 300, ["<|endoftext|>x"], "begins with"),
        (["text"], 300, [""], "begins with"),
    ],
)
def test_impossible_training_is_refused(texts: list[str], size: int, special: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteLevelBPE.train(texts, size, special)


def test_special_tokens_are_plain_text_unless_asked_for(trained: ByteLevelBPE) -> None:
    text = "a<|endoftext|>b<|a|>"
    plain, special = trained.encode(text), trained.encode(text, allow_special=True)
    assert 1498 not in plain and 1499 not in plain
    assert special[1] == 1498 and special[-1] == 1499
    assert trained.decode(plain) == trained.decode(special) == text


@pytest.mark.parametrize("bad", [-1, 1500])
def test_decoding_an_id_out_of_range_is_an_error(trained: ByteLevelBPE, bad: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 1500"):
        trained.decode_bytes([bad])


@relaxed
@given(text=st.text())
def test_bpe_round_trip_of_any_unicode(trained: ByteLevelBPE, text: str) -> None:
    assert trained.decode_bytes(trained.encode(text)) == text.encode()
    assert trained.decode_bytes(trained.encode(text, allow_special=True)) == text.encode()


def test_saved_bpe_gives_transformers_the_same_ids_on_real_text(
    trained: ByteLevelBPE, trained_folder: Path, real_text: str
) -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(trained_folder)
    ids = trained.encode(real_text, allow_special=True)
    assert auto(real_text).input_ids == ids
    assert auto.decode(ids) == trained.decode(ids) == real_text
    assert auto.eos_token_id == auto.bos_token_id == trained.eot_id
    assert len(auto) == trained.vocab_size


@relaxed
@given(text=texts)
def test_saved_bpe_gives_hugging_face_the_same_ids(trained: ByteLevelBPE, trained_folder: Path, text: str) -> None:
    other = HFTokenizer(trained_folder / "tokenizer.json")
    assert other.encode(text) == trained.encode(text)
    assert other.encode(text, allow_special=True) == trained.encode(text, allow_special=True)


def test_saved_bpe_reads_back(trained: ByteLevelBPE, trained_folder: Path) -> None:
    for ref in (trained_folder, trained_folder / "tokenizer.json", str(trained_folder)):
        again = load_tokenizer(ref)
        assert isinstance(again, ByteLevelBPE)
        assert again.fingerprint == trained.fingerprint
        assert (again.name, again.eot_id, again.bos_id) == (trained.name, trained.eot_id, None)


def test_a_begin_token_survives_saving(trained: ByteLevelBPE, tmp_path: Path) -> None:
    tokenizer = ByteLevelBPE("x", trained.ranks, special_tokens={"<s>": 1498, END_OF_TEXT: 1499}, bos_token="<s>")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteLevelBPE)
    assert again.fingerprint == tokenizer.fingerprint != trained.fingerprint
    assert again.encode_prompt("The cat") == hf_ids(tmp_path, "The cat") == [1498, *again.encode("The cat")]


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_openai_vocabularies_match_tiktoken_and_transformers(
    name: str, tiktoken_cache: Path, real_text: str, tmp_path: Path
) -> None:
    import tiktoken

    ours, theirs = load_tokenizer(name), tiktoken.get_encoding(name)
    assert ours.encode(real_text) == theirs.encode_ordinary(real_text)
    assert ours.encode(real_text, allow_special=True) == theirs.encode(real_text, allowed_special="all")
    assert ours.vocab_size == theirs.n_vocab
    assert ours.eot_id == theirs.eot_token
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
    assert HFTokenizer(tmp_path / "tokenizer.json").encode(real_text[:300_000]) == ours.encode(real_text[:300_000])
    assert hf_ids(tmp_path, SAMPLE) == ours.encode(SAMPLE, allow_special=True)
    assert HFTokenizer(tmp_path / "tokenizer.json").special_tokens == ours.special_tokens


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_our_spelling_of_the_splits_is_tiktokens(name: str, tiktoken_cache: Path) -> None:
    import tiktoken

    ours, theirs = load_tokenizer(name), tiktoken.get_encoding(name)

    @relaxed
    @given(text=texts)
    def check(text: str) -> None:
        assert ours.encode(text) == theirs.encode_ordinary(text)

    check()


def test_unused_ids_of_cl100k_base_stand_for_nothing(tiktoken_cache: Path) -> None:
    tokenizer = load_tokenizer("cl100k_base")
    assert tokenizer.decode_bytes([100256, 100275]) == b""
    assert tokenizer.decode_bytes([100257]) == END_OF_TEXT.encode()


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_a_vocabulary_that_cannot_be_had_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiktoken.registry

    def unreachable(path: str) -> bytes:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", unreachable)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"'{name}' is not here.*TIKTOKEN_CACHE_DIR.*llmkit tokenizer train"):
        load_tokenizer(name)


def test_byte_tokenizer_is_utf8(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode(SAMPLE) == list(SAMPLE.encode())
    tokenizer.save(tmp_path)
    assert hf_ids(tmp_path, SAMPLE) == tokenizer.encode(SAMPLE, allow_special=True)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("piece", ["a", " ", "\n", "!", "1", "é", "ab "])
def test_a_long_run_of_one_piece_is_encoded(trained: ByteLevelBPE, piece: str) -> None:
    text = piece * 200_000
    assert trained.decode(trained.encode(text)) == text


def edited(folder: Path, tmp_path: Path, **changes: object) -> Path:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for key, value in changes.items():
        target = content["model"] if key in content["model"] else content
        target[key] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_what_tiktoken_cannot_represent_is_left_to_hugging_face(
    trained: ByteLevelBPE, trained_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((trained_folder / "tokenizer.json").read_text("utf-8"))
    merges = content["model"]["merges"]
    possessive = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}+|\s+"}, "behavior": "Isolated", "invert": False}
    byte_level = content["decoder"]
    added = content["added_tokens"]
    for changes in (
        {"normalizer": {"type": "NFC"}},
        {"merges": [*merges[1:], merges[0]]},
        {"merges": merges[:-1]},
        {"byte_fallback": True},
        {"dropout": 0.1},
        {"decoder": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [possessive, byte_level]}},
        {"pre_tokenizer": {**byte_level, "use_regex": True, "add_prefix_space": True}},
        {"added_tokens": [{**added[0], "lstrip": True}, added[1]]},
        {"added_tokens": [{**added[0], "special": False}, added[1]]},
    ):
        path = edited(trained_folder, tmp_path, **changes)
        assert ByteLevelBPE.from_json(path) is None, changes
    assert ByteLevelBPE.from_json(edited(trained_folder, tmp_path)) is not None


def test_a_merge_that_tiktoken_would_not_make_is_left_to_hugging_face(trained: ByteLevelBPE, tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
    assert recover_merge(ranks, b"abc") == (b"a", b"bc")
    tokenizer = ByteLevelBPE("x", ranks, special_tokens={})
    tokenizer.save(tmp_path)
    assert ByteLevelBPE.from_json(tmp_path / "tokenizer.json") is not None
    path = edited(tmp_path, tmp_path, merges=[["b", "c"], ["a", "b"], ["ab", "c"]])
    assert ByteLevelBPE.from_json(path) is None


def test_merges_written_as_strings_are_read(trained: ByteLevelBPE, trained_folder: Path, tmp_path: Path) -> None:
    merges = json.loads((trained_folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    again = ByteLevelBPE.from_json(edited(trained_folder, tmp_path, merges=[" ".join(pair) for pair in merges]))
    assert again is not None
    assert again.fingerprint == trained.fingerprint


def test_gpt2s_own_form_of_tokenizer_json_is_recognised(trained_folder: Path, tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path = edited(trained_folder, tmp_path, pre_tokenizer=byte_level)
    tokenizer = ByteLevelBPE.from_json(path)
    assert tokenizer is not None
    assert tokenizer.split == "gpt2"
    assert tokenizer.encode(SAMPLE) == HFTokenizer(path).encode(SAMPLE)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', "\xff", '{"model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer_json_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, "latin-1")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_two_tokens_with_one_id_are_refused(trained: ByteLevelBPE) -> None:
    with pytest.raises(ValueError, match="one id to two tokens"):
        ByteLevelBPE("x", trained.ranks, special_tokens={END_OF_TEXT: 5})


# --- other tokenizer.json files


@pytest.fixture(scope="session")
def llama(test_data: Path) -> Path:
    return test_data / "models" / "stories260k-hf"


def test_llama_like_tokenizer_matches_transformers(llama: Path, real_text: str) -> None:
    from transformers import AutoTokenizer

    auto, ours = AutoTokenizer.from_pretrained(llama), load_tokenizer(llama)
    assert isinstance(ours, HFTokenizer)
    assert (ours.vocab_size, ours.bos_id, ours.eot_id) == (512, 1, 2)
    text = real_text[:50_000].replace(END_OF_TEXT, "")
    assert ours.encode_prompt(text) == auto(text).input_ids == [1, *ours.encode(text)]
    assert ours.decode(ours.encode(text)) == auto.decode(auto(text).input_ids, skip_special_tokens=True) == text
    assert ours.encode_prompt("a</s>", allow_special=True) == auto("a</s>").input_ids
    assert 2 not in ours.encode("a</s>")


def test_byte_fallback_decodes_to_bytes_token_by_token(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    text = "Once 日本 🎉 there"
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == b" " + text.encode()
    assert b"".join(tokenizer.decode_bytes([index]) for index in ids) == tokenizer.decode_bytes(ids)
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


def test_saving_copies_the_files_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.save(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (llama / name).read_bytes()
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored(trained_folder: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path = edited(trained_folder, tmp_path, truncation=truncation)
    assert len(HFTokenizer(path).encode(SAMPLE)) > 5


def test_an_unknown_decoder_is_an_error(trained_folder: Path, tmp_path: Path) -> None:
    path = edited(
        trained_folder,
        tmp_path,
        decoder={"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True},
    )
    with pytest.raises(ValueError, match="decodes by a rule that llmkit does not know: CTC"):
        HFTokenizer(path)


# --- by name


class TestBPE(TokenizerContract):
    @pytest.fixture
    def provider(self) -> type[TokenizerProvider]:
        return get_plugins().tokenizer("bpe")


class TestByte(TokenizerContract):
    @pytest.fixture
    def provider(self) -> type[TokenizerProvider]:
        return get_plugins().tokenizer("byte")


class TestGPT2(TokenizerContract):
    @pytest.fixture
    def provider(self, tiktoken_cache: Path) -> type[TokenizerProvider]:
        return get_plugins().tokenizer("gpt2")


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(UnknownComponent, match="did you mean gpt2"):
        load_tokenizer("gtp2")
    with pytest.raises(ValueError, match=r"there is no tokenizer \./none: no such file or folder"):
        load_tokenizer("./none")


def test_trainable_tokenizers_say_that_they_must_be_trained() -> None:
    with pytest.raises(ValueError, match="must be trained"):
        load_tokenizer("bpe")
    with pytest.raises(ValueError, match="cannot be trained"):
        get_plugins().tokenizer("byte").train([], vocab_size=300, special_tokens=())


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_trainable_tokenizers_train(name: str) -> None:
    provider = get_plugins().tokenizer(name)
    assert provider.trainable
    tokenizer: Tokenizer = provider.train(["some text, some more text"], vocab_size=300, special_tokens=["<|b|>"])
    assert {END_OF_TEXT, "<|b|>"} <= set(tokenizer.special_tokens)
    assert unicodedata.normalize("NFC", tokenizer.decode(tokenizer.encode("some text"))) == "some text"
