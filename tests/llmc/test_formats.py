"""Every file format, byte for byte against an independent writer in numpy; and damaged and foreign files."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Twister, header, model_bytes, shard_bytes

from llmkit.gpt2 import GPT2Config
from llmkit.llmc_files import read_model
from llmkit.tokenizer import load_tokenizer
from llmkit_llmc.hellaswag import encode_examples, evaluation_file, main, read_examples
from llmkit_llmc.library import AdamW, Library, LlmcError, Model, Options, Shape
from llmkit_llmc.state import Comm, Outliers, State, state_path

SHAPE = GPT2Config(vocab=300, context=24, depth=2, heads=2, width=16)
SIZES: dict[str, Any] = {"V": 300, "T": 24, "C": 16, "L": 2, "NH": 2}


def read_and_write(library: Library, source: Path, target: Path, dtype: int) -> None:
    model, options = ctypes.c_void_p(), Options(dtype, 1, 1, 1, 0, 1)
    library.call("llmc_model_read", os.fsencode(source), ctypes.byref(options), ctypes.byref(model))
    library.call("llmc_model_write", model, os.fsencode(target))
    library.llmc_model_free(model)


@pytest.mark.parametrize(("dtype", "number"), [("f32", 0), ("bf16", 1)])
def test_a_model_file_comes_back_byte_for_byte(library: Library, tmp_path: Path, dtype: str, number: int) -> None:
    content = model_bytes(np.random.default_rng(0), **SIZES, dtype=dtype)
    (tmp_path / "in.bin").write_bytes(content)
    read_and_write(library, tmp_path / "in.bin", tmp_path / "out.bin", number)
    assert (tmp_path / "out.bin").read_bytes() == content


def test_a_model_file_changes_its_dtype_by_rounding(library: Library, tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(model_bytes(np.random.default_rng(0), **SIZES))
    read_and_write(library, tmp_path / "in.bin", tmp_path / "out.bin", 1)
    assert (tmp_path / "out.bin").read_bytes() == model_bytes(np.random.default_rng(0), **SIZES, dtype="bf16")
    read_and_write(library, tmp_path / "out.bin", tmp_path / "again.bin", 0)
    wide, narrow = read_model(tmp_path / "again.bin")[1], read_model(tmp_path / "out.bin")[1]
    assert all(np.array_equal(wide[name], narrow[name]) for name in wide)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b[:-1], r"has \d+ bytes; a model of its sizes has"),
        (lambda b: b + b"x", "bytes; a model of its sizes has"),
        (lambda b: b[:500], "ended where 1024 more bytes were expected"),
        (lambda b: b"", "ended where 1024 more bytes were expected"),
        (lambda b: b"PK\3\4" + b[4:], "is not a model file"),
        (lambda b: header(20240326, 4, 24, 300, 2, 2, 16, 384) + b[1024:], "a model file of version 4"),
        (lambda b: header(20240326, 3, 24, 300, -2, 2, 16, 384) + b[1024:], "cannot be"),
        (lambda b: header(20240326, 3, 24, 300, 2, 3, 16, 384) + b[1024:], "do not divide"),
        (lambda b: header(20240326, 3, 24, 2**31 - 1, 2, 2, 16, 2**31 - 1) + b[1024:], "too large"),
    ],
)
def test_a_damaged_model_file(library: Library, tmp_path: Path, change: Any, match: str) -> None:
    (tmp_path / "in.bin").write_bytes(change(model_bytes(np.random.default_rng(0), **SIZES)))
    with pytest.raises(LlmcError, match=match):
        read_and_write(library, tmp_path / "in.bin", tmp_path / "out.bin", 0)
    assert not (tmp_path / "out.bin").exists()


def trained(library: Library, dtype: str = "fp32", *, rate: float = 1e-3, **options: Any) -> Model:
    model = Model(library, SHAPE, dtype=dtype, **options)
    model.initialise(3)
    x = np.arange(24).reshape(2, 12)
    model.gradient(x, x + 1, scale=1 / 24, accumulate=False)
    model.update(AdamW(rate, 0.9, 0.95, 1e-8, 0.1, 1.0, 1, 5))
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_state_file_byte_for_byte(library: Library, tmp_path: Path, dtype: str) -> None:
    model = trained(library, dtype, rate=0.0)
    twister = Twister(42)
    shards, samples = twister.shuffle(list(range(3))), twister.shuffle(list(range(700)))
    orders = [np.array(order, np.int32) for order in (shards, samples)]
    state = State(step=17, shuffle=1, rng=2**63 + 5, rng_last=99, shard=2, sample=600, shards=3, samples=700)
    state.shard_order, state.sample_order = (order.ctypes.data for order in orders)
    mt = twister.stored()
    ctypes.memmove(ctypes.byref(state, State.mt.offset), mt, len(mt))
    state.loss = Outliers((ctypes.c_double * 128)(1.5, 2.5), 2, 0)
    library.call("llmc_state_write", model.handle, ctypes.byref(state), os.fsencode(tmp_path / "s.bin"))
    moments = gradient_moments(model, dtype)
    head = np.zeros(256, "<i4")
    head[:6] = 20240527, 1, 1, 0, int(dtype == "bf16"), 1
    head[10] = 17
    head[20:22] = np.array([2**63 + 5], "<u8").view("<i4")
    head[22:24] = np.array([99], "<u8").view("<i4")
    head[30:32], head[32:34] = np.array([2], "<u8").view("<i4"), np.array([600], "<u8").view("<i4")
    head[40:46] = 1, 24, 300, 2, 2, 16
    loss = np.array([1.5, 2.5, *[0.0] * 126], "<f8").tobytes() + np.array([2, 0], "<i4").tobytes()
    expected = [
        head.tobytes(),
        *moments,
        np.array([3], "<u8").tobytes(),
        orders[0].tobytes(),
        np.array([700], "<u8").tobytes(),
    ]
    expected += [orders[1].tobytes(), mt, loss, bytes(1032)]
    written = (tmp_path / "s.bin").read_bytes()
    assert len(mt) == 2520 and len(written) == sum(map(len, expected))
    assert written == b"".join(expected)
    back = State()
    library.call("llmc_state_read", model.handle, ctypes.byref(back), os.fsencode(tmp_path / "s.bin"))
    assert (back.step, back.rng, back.sample, back.loss.values[1], back.loss.count) == (17, 2**63 + 5, 600, 2.5, 2)
    library.call("llmc_state_write", model.handle, ctypes.byref(back), os.fsencode(tmp_path / "t.bin"))
    assert (tmp_path / "t.bin").read_bytes() == written


def gradient_moments(model: Model, dtype: str) -> list[bytes]:
    """m, v and, for bf16, the master weights after one step from zero moments, as AdamW's definition gives them."""
    gradients = model.gradients()
    m = (np.float32(1) - np.float32(0.9)) * gradients
    v = (np.float32(1) - np.float32(0.95)) * (gradients * gradients)
    stored = [m, v] if dtype == "fp32" else [m, v, model.get()]  # a rate of 0 left the weights as they were
    return [array.astype("<f4").tobytes() for array in stored]


def test_a_state_of_another_model_or_number_of_processes(library: Library, tmp_path: Path) -> None:
    model, state = trained(library), State(step=1)
    state.write(library, model, tmp_path, 0, position=8)
    path = state_path(tmp_path, 0)
    content = path.read_bytes()
    assert State().read(library, model, tmp_path, Comm(0, 1)) == 8
    other = Model(library, GPT2Config(vocab=300, context=24, depth=1, heads=2, width=16))
    with pytest.raises(LlmcError, match="belongs to another model: 2 layers"):
        State().read(library, other, tmp_path, Comm(0, 1))
    with pytest.raises(LlmcError, match="belongs to process 0 of 1, not to 0 of 2"):
        State().read(library, Model(library, SHAPE, ranks=2), tmp_path, Comm(0, 2))
    with pytest.raises(LlmcError, match="has no master weights"):
        State().read(library, Model(library, SHAPE, dtype="bf16"), tmp_path, Comm(0, 1))
    for damaged, match in (
        (content[:5000], "the moments alone take"),
        (content[:-8], "truncated"),
        (b"x" * 4000, "is not a training state"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(LlmcError, match=match):
            State().read(library, model, tmp_path, Comm(0, 1))


def evaluate(library: Library, path: Path, rows: int = 4, T: int = 24) -> tuple[int, int]:
    model = Model(library, SHAPE)
    model.initialise(3)
    correct, examples = ctypes.c_int32(), ctypes.c_int32()
    counts = ctypes.byref(correct), ctypes.byref(examples)
    library.call("llmc_eval_run", os.fsencode(path), model.handle, rows, T, 0, 1, *counts)
    return correct.value, examples.value


def eval_bytes(examples: list[tuple[int, list[int], list[list[int]]]]) -> bytes:
    body = []
    for index, (label, context, endings) in enumerate(examples):
        words = [label, 4, len(context), *context]
        for ending in endings:
            words += [len(ending), *ending]
        body.append(np.array([65535, 2 * (len(words) + 3), index, *words], "<u2").tobytes())
    return header(20240522, 1, len(body), max(map(len, body))) + b"".join(body)


def test_an_eval_file_and_its_score(library: Library, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    examples = [
        (
            int(rng.integers(4)),
            rng.integers(0, 300, rng.integers(1, 9)).tolist(),
            [rng.integers(0, 300, rng.integers(1, 9)).tolist() for _ in range(4)],
        )
        for _ in range(23)
    ]
    (tmp_path / "e.bin").write_bytes(eval_bytes(examples))
    model, expected = Model(library, SHAPE), 0
    model.initialise(3)
    for label, context, endings in examples:
        means = []
        for ending in endings:
            row = np.array([context + ending])
            _, losses = model.loss(row[:, :-1], row[:, 1:])
            means.append(losses[0, len(context) - 1 :].mean())
        expected += int(np.argmin(means)) == label
    assert {evaluate(library, tmp_path / "e.bin", rows) for rows in (1, 4, 13, 200)} == {(expected, 23)}


def test_the_eval_writer(tmp_path: Path, test_data: Path, library: Library) -> None:
    lines = (test_data / "hellaswag" / "validation.jsonl").read_text("utf-8").splitlines()[:20]
    (tmp_path / "v.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer("byte")
    expected = []
    for example in map(json.loads, lines):
        expected.append(
            (
                int(example["label"]),
                tokenizer.encode(example["ctx"]),
                [tokenizer.encode(" " + e) for e in example["endings"]],
            )
        )
    content = encode_examples(read_examples(tmp_path / "v.jsonl"), tokenizer)
    assert content == eval_bytes(expected)
    main([str(tmp_path / "v.jsonl"), str(tmp_path / "v.bin"), "--tokenizer", "byte"])
    assert (tmp_path / "v.bin").read_bytes() == content
    assert evaluation_file(tmp_path / "v.jsonl", tokenizer).read_bytes() == content
    assert evaluation_file(tmp_path / "v.bin", tokenizer) == tmp_path / "v.bin"
    with pytest.raises(LlmcError, match="more than the sequence length of 24"):
        evaluate(library, tmp_path / "v.bin")


def test_examples_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    for line in ("{", '{"ctx": "a", "endings": ["b"], "label": 0}', '{"ctx": "a"}', "[]"):
        path.write_text(line)
        with pytest.raises(ValueError, match="line 1, is no HellaSwag example"):
            list(read_examples(path))
    with pytest.raises(ValueError, match="there are no examples"):
        encode_examples([], load_tokenizer("byte"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:1024] + b"\0\0" + b[1026:], lambda b: b[:1026] + b"\xff\x7f" + b[1028:]]
)
def test_a_damaged_eval_file(library: Library, tmp_path: Path, damage: Any) -> None:
    content = eval_bytes([(1, [1, 2], [[3], [4], [5], [6]])] * 2)
    (tmp_path / "e.bin").write_bytes(damage(content))
    with pytest.raises(LlmcError, match="damaged at example"):
        evaluate(library, tmp_path / "e.bin")


class Loader(ctypes.Structure):
    """The C loader."""

    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("B", "T")],
        *[(n, ctypes.c_int) for n in ("rank", "ranks", "shuffle", "vocab")],
        ("paths", ctypes.c_void_p),
        *[(n, ctypes.c_int64) for n in ("shards", "tokens")],
        *[(n, ctypes.c_uint64) for n in ("shard", "sample")],
        ("samples", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("shard_order", "sample_order")],
        ("mt", ctypes.c_uint64 * 315),
        *[(n, ctypes.c_void_p) for n in ("file", "path")],
        ("width", ctypes.c_int),
        *[(n, ctypes.c_void_p) for n in ("raw", "inputs", "targets")],
    ]


def opened(
    library: Library,
    pattern: Path,
    *,
    B: int,
    T: int,
    rank: int = 0,
    ranks: int = 1,
    shuffle: int = 1,
    vocab: int = 70_000,
) -> Loader:
    loader = Loader()
    sizes = ctypes.c_int64(B), ctypes.c_int64(T), rank, ranks, shuffle, vocab
    library.call("loader_open", ctypes.byref(loader), os.fsencode(pattern), *sizes)
    return loader


def following(library: Library, loader: Loader) -> tuple[list[int], list[int]]:
    library.call("loader_next", ctypes.byref(loader))
    n = loader.B * loader.T
    batches = [
        np.ctypeslib.as_array(ctypes.cast(p, ctypes.POINTER(ctypes.c_int32)), (n,)).tolist()
        for p in (loader.inputs, loader.targets)
    ]
    return batches[0], batches[1]


@pytest.mark.parametrize("wide", [False, True])
def test_the_loaders_order_is_llmcs(library: Library, tmp_path: Path, wide: bool) -> None:
    rng, B, T, ranks = np.random.default_rng(0), 2, 5, 3
    shards = [rng.integers(0, 60_000 + 9000 * wide, n) for n in (331, 100, 2000)]
    for index, tokens in enumerate(shards):
        (tmp_path / f"t_{index}.bin").write_bytes(shard_bytes(tokens, wide=wide))
    for rank in range(ranks):
        loader, twister = opened(library, tmp_path / "t_*.bin", B=B, T=T, rank=rank, ranks=ranks), Twister(42 + rank)
        assert loader.tokens == 2431
        order = [0, 1, 2]
        for _ in range(2):  # epochs
            order = twister.shuffle(order)
            for shard in order:
                tokens = shards[shard]
                for block in twister.shuffle(list(range((len(tokens) - 1) // (ranks * B * T)))):
                    at = (block * ranks + rank) * B * T
                    x, y = following(library, loader)
                    assert x == tokens[at : at + B * T].tolist() and y == tokens[at + 1 : at + B * T + 1].tolist()
        library.loader_close(ctypes.byref(loader))


def test_a_shard_beyond_two_gigabytes(library: Library, tmp_path: Path) -> None:
    tokens, path = 1_200_000_000, tmp_path / "big.bin"
    with path.open("wb") as file:  # sparse: it takes no room
        file.write(header(20240520, 1, tokens))
        file.truncate(1024 + 2 * tokens)
        file.seek(1024 + 2 * 1_150_000_000)
        file.write(np.arange(1, 4001, dtype="<u2").tobytes())
    loader = opened(library, path, B=1, T=1000, shuffle=0)
    loader.sample = 1_150_000
    assert following(library, loader)[0] == list(range(1, 1001))
    assert following(library, loader)[1] == list(range(1002, 2002))
    library.loader_close(ctypes.byref(loader))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (shard_bytes(range(50))[:-1], "has 1123 bytes where 50 tokens take 1124; it is truncated"),
        (shard_bytes(range(50)) + b"x", "bytes where 50 tokens take"),
        (b"GIF89a" + bytes(1100), "is not a token shard"),
        (b"", "ended where 1024 more bytes"),
        (shard_bytes(range(10)), "fewer than one step"),
        (shard_bytes([70_000 % 65536] * 50), "token 4464 at place 0 of .* is outside the vocabulary of 300"),
    ],
)
def test_a_damaged_or_foreign_shard(library: Library, tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "s.bin").write_bytes(content)

    def use() -> None:
        following(library, opened(library, tmp_path / "s.bin", B=1, T=16, vocab=300, shuffle=0))

    with pytest.raises(LlmcError, match=match):
        use()


def test_shards_that_are_not_there(library: Library, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="no file matches"):
        opened(library, tmp_path / "none_*.bin", B=1, T=4)


def test_sizes_by_name(library: Library) -> None:
    config = Shape()

    def named(text: str) -> tuple[int, int, int, int]:
        library.call("llmc_config_from_descriptor", text.encode(), 50257, ctypes.byref(config))
        return config.layers, config.channels, config.heads, config.max_t

    assert named("d12") == named("gpt2:d12") == (12, 768, 12, 1024)
    assert named("d48") == (48, 1600, 25, 1024)
    assert named("gpt3:c768") == (12, 768, 12, 2048) and named("gpt3:c2048") == (24, 2048, 16, 2048)
    assert config.padded_vocab == 50304
    for bad in ("d7", "12", "gpt3:c5", "dx", "d", "gpt2:12", "d12x"):
        with pytest.raises(LlmcError):
            named(bad)
