"""Token shards: llm.c's files, byte for byte, and back."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.data.shards import ShardError, ShardWriter, header, open_shard, token_dtype
from llmkit.data.tokens import TokenData, TrainBatches


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["uint16", "uint32"]),
    chunks=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=30), max_size=8),
    shard_tokens=st.integers(2, 40),
)
def test_shard_round_trip(
    dtype: str, chunks: list[list[int]], shard_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "train", dtype, shard_tokens)
    for chunk in chunks:
        writer.write(np.array(chunk, dtype=dtype))
    shards = writer.close()
    total = [token for chunk in chunks for token in chunk]
    assert writer.tokens == sum(shard.tokens for shard in shards) == len(total)
    assert [shard.name for shard in shards] == [f"train_{i:06d}.bin" for i in range(len(shards))]
    assert all(shard.tokens == shard_tokens for shard in shards[:-1])
    read = [int(token) for shard in shards for token in open_shard(folder / shard.name)]
    assert read == total


@pytest.mark.parametrize(
    ("dtype", "code", "magic", "version"), [("uint16", "H", 20240520, 1), ("uint32", "I", 20240801, 7)]
)
def test_the_bytes_are_llm_cs(dtype: str, code: str, magic: int, version: int, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "val", dtype, 100)
    writer.write(np.array([1, 2, 65535], dtype=dtype))
    writer.close()
    expected = struct.pack("<256i", magic, version, 3, *[0] * 253) + struct.pack(f"<3{code}", 1, 2, 65535)
    assert (tmp_path / "val_000000.bin").read_bytes() == expected


def test_the_narrow_form_is_used_where_it_holds_the_vocabulary() -> None:
    assert token_dtype(65536) == "uint16"
    assert token_dtype(65537) == "uint32"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than the header"),
        (header("uint16", 3)[:500], "shorter than the header"),
        (b"\0" * 1024, "begins with 0, not 20240520"),
        (struct.pack("<256i", 20240520, 2, *[0] * 254), "version 2"),
        (header("uint16", 3) + b"\0" * 5, "truncated or damaged"),
        (header("uint16", 3) + b"\0" * 7, "truncated or damaged"),
        (header("uint32", 3) + b"\0" * 6, "truncated or damaged"),
    ],
)
def test_what_is_no_whole_shard_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message):
        open_shard(path)


def test_a_shard_without_tokens_opens(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(header("uint16", 0))
    assert len(open_shard(path)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is empty"),
        ("other", "has no meta.json"),
        ("{", "is damaged"),
        ("[]", "not a data description"),
        ('{"format": 99}', "not a data description"),
        ('{"format": 1}', "it lacks 'train'"),
        ('{"format": 1, "train": 3}', "it lacks"),
    ],
)
def test_a_data_folder_that_is_none_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content == "other":
        (tmp_path / "train_000000.bin").write_bytes(b"")
    elif content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TokenData(tmp_path)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    world=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_an_epoch_takes_each_sequence_once_over_all_ranks(
    lengths: list[int], batch: int, length: int, world: int, seed: int
) -> None:
    shards = [np.arange(1000 * i, 1000 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)]
    if max(lengths) <= length:
        with pytest.raises(ValueError, match="prepare more data"):
            TrainBatches(shards, batch, length, seed=seed)
        return
    ranks = [TrainBatches(shards, batch, length, seed=seed, rank=rank, world=world) for rank in range(world)]
    epoch = ranks[0].sequences_per_epoch
    seen: list[int] = []
    while len(seen) < 2 * (epoch + world * batch):
        for reader in ranks:
            x, y = next(reader)
            assert x.shape == y.shape == (batch, length)
            assert ((y - x) == 1).all()  # a target is the token behind its input
            seen += x[:, 0].tolist()
    assert len(set(seen[:epoch])) == len(set(seen[epoch : 2 * epoch])) == epoch

    one = TrainBatches(shards, batch, length, seed=seed)
    one.position = world * batch  # resuming: the order depends on nothing but the position
    assert next(one)[0][:, 0].tolist() == seen[world * batch : (world + 1) * batch]
