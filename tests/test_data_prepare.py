"""`llmkit data prepare` and `data info`: what lands in the folder, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.cli.main import run
from llmkit.data import prepare as preparation
from llmkit.data.encode import Batch, Encoded, Encoder, encode_all
from llmkit.data.prepare import Limits, prepare
from llmkit.data.tokens import TokenData
from llmkit.tokenizer import END_OF_TEXT, load_tokenizer

COMMAND = [sys.executable, "-m", "llmkit"]


def stories(count: int) -> list[str]:
    return [
        f"Story {i}. Once there was a cat who counted to {i * 7919}, and then it slept.\n" * 3 for i in range(count)
    ]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(400)))
    return path


def tokens(data: TokenData, split: Any) -> list[int]:
    return [int(token) for shard in data.shards(split) for token in shard]


def documents(data: TokenData, split: Any) -> list[str]:
    """The texts between the end-of-text tokens of a split."""
    assert data.eot_id is not None
    stream = np.array(tokens(data, split))
    starts = [*np.flatnonzero(stream == data.eot_id), len(stream)]
    return [data.tokenizer.decode(stream[a + 1 : b].tolist()) for a, b in pairwise(starts)]


def test_the_folder_holds_the_text_its_tokenizer_and_its_counts(jsonl: Path, tmp_path: Path) -> None:
    meta = prepare([str(jsonl)], tmp_path / "data", tokenizer="bpe", vocab_size=400, shard_tokens=3000)
    data = TokenData(tmp_path / "data")
    assert data.meta == meta
    assert data.tokenizer.fingerprint == data.tokenizer_fingerprint
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(stories(400))
    assert val
    assert set(train).isdisjoint(val)
    for split, found in (("train", train), ("val", val)):
        counts = meta[split]
        assert counts["documents"] == len(found)
        assert counts["bytes"] == sum(len(text.encode()) for text in found)
        assert counts["tokens"] == len(tokens(data, split)) == sum(shard["tokens"] for shard in counts["shards"])
    assert [shard["name"] for shard in meta["train"]["shards"]][:2] == ["train_000000.bin", "train_000001.bin"]
    assert all(shard["tokens"] == 3000 for shard in meta["train"]["shards"][:-1])
    assert meta["dtype"] == "uint16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "stories.jsonl"]


def test_the_result_does_not_depend_on_the_number_of_workers(jsonl: Path, tmp_path: Path) -> None:
    one = prepare([str(jsonl)], tmp_path / "one", tokenizer="byte", workers=1)
    three = prepare([str(jsonl)], tmp_path / "three", tokenizer="byte", workers=3)
    assert one == three
    for name in ("train_000000.bin", "val_000000.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_a_large_vocabulary_is_written_as_uint32(jsonl: Path, tmp_path: Path, test_data: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tokenizers" / "tiktoken_cache"))
        meta = prepare([str(jsonl)], tmp_path / "data", tokenizer="cl100k_base")
    assert meta["dtype"] == "uint32"
    data = TokenData(tmp_path / "data")
    assert max(tokens(data, "train")) == data.eot_id == 100257
    assert sorted(documents(data, "train") + documents(data, "val")) == sorted(stories(400))


@pytest.mark.parametrize("name", ["bpe", "char", "byte"])
def test_named_tokenizers(name: str, jsonl: Path, tmp_path: Path) -> None:
    prepare([str(jsonl)], tmp_path / "data", tokenizer=name, limits=Limits(documents=20))
    assert sorted(documents(TokenData(tmp_path / "data"), "train"))[:1] == stories(1)


def test_a_finished_tokenizer_is_taken_from_a_folder(jsonl: Path, tmp_path: Path, test_data: Path) -> None:
    llama = test_data / "models" / "stories260k-hf"
    meta = prepare([str(jsonl)], tmp_path / "a", tokenizer=str(llama))
    assert meta["tokenizer"]["fingerprint"] == load_tokenizer(llama).fingerprint
    again = prepare([str(jsonl)], tmp_path / "b", tokenizer=str(tmp_path / "a"))  # a data folder has one too
    assert again["fingerprint"] == meta["fingerprint"]
    with pytest.raises(ValueError, match="--vocab-size is for a tokenizer that is trained"):
        prepare([str(jsonl)], tmp_path / "c", tokenizer=str(llama), vocab_size=500)


def test_a_long_text_becomes_documents_of_parts(tmp_path: Path, test_data: Path) -> None:
    source = test_data / "text" / "tinyshakespeare" / "input.txt"
    meta = prepare([str(source)], tmp_path / "data", tokenizer="byte")
    data = TokenData(tmp_path / "data")
    assert meta["val"]["documents"] >= 1
    assert meta["train"]["documents"] > 10
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == source.stat().st_size
    parts = sorted(documents(data, "train") + documents(data, "val"))
    text = source.read_text("utf-8")
    assert all(part in text and part.endswith("\n") for part in parts)


@pytest.mark.parametrize("text", ["ab", "one two three four five six seven eight nine ten", "line\n" * 30])
def test_a_single_document_is_divided_to_train_and_to_validate(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", tokenizer="byte")
    data = TokenData(tmp_path / "data")
    assert "".join(documents(data, "train") + documents(data, "val")) == text
    assert len(tokens(data, "train")) >= len(tokens(data, "val")) > 0


@pytest.mark.parametrize("content", ["", " \n\n ", "x"])
def test_too_little_text_is_refused_and_leaves_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match="there is no text to"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "data", tokenizer="byte")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=40),
    fraction=st.floats(0.001, 0.5),
    batch=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_the_split_is_never_empty_and_never_everything(
    sizes: list[int], fraction: float, batch: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("split")
    texts = [f"{seed}-{i}-" + "x" * size for i, size in enumerate(sizes)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_BATCH_CHARACTERS", batch)
        prepare([str(folder / "a.jsonl")], folder / "data", tokenizer="byte", val_fraction=fraction)
    data = TokenData(folder / "data")
    train, val = documents(data, "train"), documents(data, "val")
    assert train
    assert val
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in the order of the source


def test_a_document_is_in_the_same_split_wherever_it_stands(tmp_path: Path) -> None:
    texts = stories(300)
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, tokenizer="byte", val_fraction=0.2)
    first, second = (set(documents(TokenData(tmp_path / name), "val")) for name in "ab")
    assert 30 < len(first) < 100
    assert len(first ^ second) <= 2  # the first document of a source always trains


def test_validation_text_of_its_own(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text(f"validate\n{END_OF_TEXT}\non this")
    prepare([str(jsonl)], tmp_path / "data", tokenizer="byte", val_sources=[str(tmp_path / "val.txt")])
    data = TokenData(tmp_path / "data")
    assert documents(data, "val") == ["validate", "on this"]
    assert documents(data, "train") == stories(400)


def test_limits(jsonl: Path, tmp_path: Path) -> None:
    ten = prepare([str(jsonl)], tmp_path / "a", tokenizer="byte", limits=Limits(documents=10))
    assert ten["train"]["documents"] + ten["val"]["documents"] == 10
    length = len(stories(1)[0]) + 1
    some = prepare([str(jsonl)], tmp_path / "b", tokenizer="byte", limits=Limits(tokens=5 * length), workers=1)
    reached = some["train"]["tokens"] + some["val"]["tokens"]
    assert 5 * length <= reached < 6.5 * length
    many = prepare([str(jsonl)], tmp_path / "c", tokenizer="byte", limits=Limits(tokens=5 * length), workers=2)
    assert many == some


def test_several_sources_follow_one_another(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first of all\n")
    meta = prepare([str(tmp_path / "a.txt"), str(jsonl)], tmp_path / "data", tokenizer="byte")
    assert meta["sources"] == [str(tmp_path / "a.txt"), str(jsonl)]
    assert documents(TokenData(tmp_path / "data"), "train")[0] == "first of all\n"


def test_preparing_twice_gives_the_same_fingerprint_and_other_text_another(jsonl: Path, tmp_path: Path) -> None:
    first = prepare([str(jsonl)], tmp_path / "a", vocab_size=300)
    second = prepare([str(jsonl)], tmp_path / "b", vocab_size=300, shard_tokens=1000)
    third = prepare([str(jsonl)], tmp_path / "c", vocab_size=300, limits=Limits(documents=399))
    other = prepare([str(jsonl)], tmp_path / "d", vocab_size=301)
    assert first["fingerprint"] == second["fingerprint"]
    assert len({meta["fingerprint"] for meta in (first, third, other)}) == 3


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare([str(jsonl)], out, tokenizer="byte")
    before = (out / "meta.json").read_bytes()
    with pytest.raises(FileExistsError, match="there already"):
        prepare([str(jsonl)], out, tokenizer="byte")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare([str(bad)], out, tokenizer="byte", overwrite=True)
    assert (out / "meta.json").read_bytes() == before
    prepare([str(jsonl)], out, tokenizer="byte", limits=Limits(documents=5), overwrite=True)
    assert TokenData(out).splits["train"].documents < 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no data folder made by llmkit"):
        prepare([str(jsonl)], tmp_path / "mine", tokenizer="byte", overwrite=True)


def test_what_a_killed_preparation_left_is_removed_by_the_next(jsonl: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".tmp-{ended.pid}-data"
    other = tmp_path / f".tmp-{os.getpid()}-other"
    left.mkdir()
    other.mkdir()
    prepare([str(jsonl)], tmp_path / "data", tokenizer="byte")
    assert not left.exists()
    assert other.exists()


def test_tokens_of_another_tokenizer_are_noticed(jsonl: Path, tmp_path: Path) -> None:
    prepare([str(jsonl)], tmp_path / "a", tokenizer="byte")
    prepare([str(jsonl)], tmp_path / "b", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / "tokenizer" / name).write_bytes((tmp_path / "b" / "tokenizer" / name).read_bytes())
    with pytest.raises(ValueError, match="another tokenizer"):
        _ = TokenData(tmp_path / "a").tokenizer


# --- the command line


def test_json_is_one_object_and_everything_else_goes_to_stderr(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert run(["data", "prepare", str(jsonl), "--out", str(out), "--vocab-size", "300", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["data"] == str(out)
    assert result["train"]["tokens"] > 0
    assert "training tokenizer 'bpe'" in printed.err
    assert run(["data", "info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert run(["data", "info", str(out)]) == 0
    assert "bytes/token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stdlb", "--out", "{}/x"], 2, "did you mean stdlib"),
        (["{}/stories.jsonl", "--out", "{}/x", "--tokenizer", "gtp2"], 2, "did you mean gpt2"),
        (["{}/stories.jsonl", "--out", "{}/x", "--text-field", "body"], 1, "line 1: there is no field 'body'"),
        (["{}/stories.jsonl", "--out", "{}/x", "--vocab-size", "200"], 1, "too small"),
        (["{}/stories.jsonl", "--out", "{}/x", "--workers", "0"], 2, "--workers"),
        (["{}/stories.jsonl", "--out", "{}/x", "--val", "stdlib", "--val-fraction", "0.1"], 2, "exclude each other"),
        (["--out", "{}/x"], 2, "SOURCE"),
        (["{}/stories.jsonl", "--out", "{}"], 1, "there already"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], code: int, message: str, jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "prepare", *(argument.format(tmp_path) for argument in arguments)]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["stories.jsonl"]


def test_info_of_a_truncated_shard_is_an_error(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare([str(jsonl)], tmp_path / "data", tokenizer="byte")
    shard = tmp_path / "data" / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(["data", "info", str(tmp_path / "data")]) == 1
    assert "truncated" in capsys.readouterr().err


# --- processes


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """48 MB of text: seconds of work, many batches."""
    path = tmp_path / "large.txt"
    block = "".join(stories(4000))
    path.write_text(block * (48_000_000 // len(block)))
    return path


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "data", "prepare", str(source), "--tokenizer", "byte", "--out", str(out), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=obey_sigint,
    )


def obey_sigint() -> None:
    """A shell's background job ignores SIGINT, and so would all that it starts: the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_workers(process: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """The worker processes, once tokens are being written."""
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        if any(shard.stat().st_size > 1024 for shard in folder.glob(".tmp-*/train_*.bin")):
            return [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.01)
    raise AssertionError(f"it ended too early: {process.communicate()}")


def test_ctrl_c_leaves_nothing_and_exits_130(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "data", "--workers", "2")
    workers = wait_for_workers(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["large.txt"]
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_a_killed_worker_is_a_clear_error(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "data", "--workers", "2")
    os.kill(wait_for_workers(process, tmp_path)[0].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process was killed" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["large.txt"]


def test_workers_end_with_a_killed_parent_and_no_data_folder_appears(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "data", "--workers", "2")
    workers = wait_for_workers(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert not (tmp_path / "data").exists()


def test_memory_stays_bounded_while_a_large_text_streams(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "data", "--workers", "2")
    parent, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for each in (parent, *parent.children(recursive=True)):
            try:
                total += each.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        peak = max(peak, total)
        time.sleep(0.05)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert peak < 400e6  # far below 1 GB, and the same for any length: nothing but a few batches is held
    meta = TokenData(tmp_path / "data").meta
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == large.stat().st_size


def test_a_full_disk_is_one_sentence_and_leaves_nothing(large: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails the same write calls as a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20));"
    code = f"import sys; {limit} from llmkit.cli.main import main; main(sys.argv[1:])"
    arguments = ["data", "prepare", str(large), "--tokenizer", "byte", "--out", str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "train_000000.bin: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["large.txt"]


def test_batches_come_back_in_order_and_few_are_held(tmp_path: Path) -> None:
    load_tokenizer("byte").save(tmp_path)
    taken = 0

    def batches() -> Any:
        nonlocal taken
        for i in range(60):
            taken += 1
            yield Batch([f"{i}" * (1 + 500 * (i % 3))], "train", None)

    done = 0
    for batch, encoded in encode_all(batches(), tmp_path, dtype="uint16", val_fraction=0.1, workers=2):
        assert isinstance(encoded, Encoded)
        assert bytes(encoded.tokens[1:].astype(np.uint8)).decode() == batch.texts[0]
        assert taken - done <= 6
        done += 1
    assert done == 60


@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=10), keep=st.integers(1, 10))
@settings(deadline=None)
def test_the_first_documents_of_a_batch(texts: list[str], keep: int) -> None:
    encoder = Encoder(load_tokenizer("byte"), "uint16", 0.5)
    part, whole = encoder(Batch(texts[:keep], "either", None)), encoder(Batch(texts, "either", None)).first(keep)
    for name in ("tokens", "counts", "sizes", "validation"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))
