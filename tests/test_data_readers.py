"""Readers: every kind of text file, streamed; errors name the file, the place and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.component import MissingRequirement
from llmkit.data import split as splitting
from llmkit.data.readers import FileSource, find_files, open_source, read_file
from llmkit.data.split import split_stream, split_text
from llmkit.tokenizer import END_OF_TEXT

DOCUMENTS = ["first\ndocument", "zweites Dokument: ü 日本 🎉", 'third "one"\r\nwith more']


def pack(path: Path, content: bytes) -> Path:
    """Write `content` at `path`, compressed as its name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        import zstandard

        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


def parquet_bytes(rows: dict[str, list[object]], folder: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "unpacked"
    pq.write_table(pa.table(rows), path, row_group_size=2)
    content = path.read_bytes()
    path.unlink()
    return content


def write(path: Path, documents: list[str]) -> Path:
    if ".jsonl" in path.name:
        return pack(path, "\n".join(json.dumps({"id": 1, "text": text}) for text in documents).encode() + b"\n\n")
    if ".parquet" in path.name:
        return pack(path, parquet_bytes({"id": [1] * len(documents), "text": list(documents)}, path.parent))
    return pack(path, END_OF_TEXT.join(documents).encode())


def texts(source: FileSource) -> list[str]:
    return [document.text for document in source.documents()]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_and_compression(kind: str, compression: str, tmp_path: Path) -> None:
    source = FileSource([write(tmp_path / f"a{kind}{compression}", DOCUMENTS)])
    documents = list(source.documents())
    assert [document.text for document in documents] == DOCUMENTS
    positions = [document.position or 0.0 for document in documents]
    assert all(0 < position <= 1 for position in positions)
    assert positions[-1] > 0.9


def test_folders_and_globs_are_sorted_and_hidden_files_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "sub/c.txt.gz", "notes.md", ".hidden.txt", "sub/.git/d.txt"):
        write(tmp_path / name, DOCUMENTS)
    assert [path.name for path in find_files(str(tmp_path))] == ["a.jsonl", "b.txt", "c.txt.gz"]
    assert [path.name for path in find_files(f"{tmp_path}/**/*.txt*")] == ["b.txt", "c.txt.gz"]
    source = open_source(str(tmp_path))
    assert isinstance(source, FileSource)
    assert texts(source) == DOCUMENTS * 3


def test_the_text_field_can_be_chosen(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.jsonl", b'{"body": "x"}\n{"body": "y"}\n')
    assert texts(FileSource([path], text_field="body")) == ["x", "y"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert [d.text for d in read_file(pack(tmp_path / "a.txt", b"\xef\xbb\xbfabc"))] == ["abc"]
    assert [d.text for d in read_file(pack(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "abc"}'))] == ["abc"]


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.jsonl", rb'{"text": "a\ud83d b \ud83c\udf89"}')
    assert [d.text for d in read_file(path)] == ["a\ufffd b 🎉"]


def test_files_without_documents_give_none(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl"):
        assert list(read_file(pack(tmp_path / name, b""))) == []
    assert list(read_file(write(tmp_path / "c.parquet", []))) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good " * 300_000 + b"\xe9 bad", r"a\.txt is not UTF-8 text: byte 0xe9 at offset 1500000.*iconv"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"0xff at offset 5"),
        ("a.txt", b"cut in a character: \xe6\x97", r"at offset 20"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl is not UTF-8 text: byte 0xff at offset 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: this is not JSON"),
        ("a.jsonl", b"\n[1]\n", r"a\.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", b'{"body": "a", "n": 1}', r"line 1: there is no field 'text', but 'body', 'n'.*--text-field"),
        ("a.jsonl", b'{"text": null}', r"line 1: field 'text' holds null, not text"),
        ("a.jsonl", b'{"text": 3}', r"line 1: field 'text' holds int, not text"),
        ("a.parquet", b"no parquet at all", r"a\.parquet is damaged, or no parquet file"),
        ("a.parquet", b"", r"a\.parquet is damaged, or no parquet file"),
    ],
)
def test_bad_content_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = pack(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(read_file(path))


def test_bad_parquet_rows_are_named(tmp_path: Path) -> None:
    missing = pack(tmp_path / "a.parquet", parquet_bytes({"body": ["a"]}, tmp_path))
    with pytest.raises(ValueError, match=r"a\.parquet: there is no field 'text', but 'body'.*--text-field"):
        list(read_file(missing))
    null = pack(tmp_path / "b.parquet", parquet_bytes({"text": ["a", "b", None]}, tmp_path))
    with pytest.raises(ValueError, match=r"b\.parquet, row 3: field 'text' holds null"):
        list(read_file(null))


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    one, two = pack(tmp_path / "1.txt.zst", b"one "), pack(tmp_path / "2.txt.zst", b"two")
    both = tmp_path / "both.txt.zst"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert [d.text for d in read_file(both)] == ["one two"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet.gz"])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_compression_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [f"{i} some text" for i in range(1000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"plain text")
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        list(read_file(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/none.txt", "there is no file, folder or data source"),
        ("{}/*.txt", "no text files match"),
        ("{}", "no text files in"),
        ("stdlb", "did you mean stdlib"),
        ("{}/a.bin", "no text file that llmkit reads: .txt, .jsonl or .parquet"),
        ("hf:", "names no dataset"),
    ],
)
def test_sources_that_are_none(spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        open_source(spec.format(tmp_path))


def test_a_missing_module_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt.zst", DOCUMENTS)
    monkeypatch.setattr("llmkit.component.find_spec", lambda module: None)
    with pytest.raises(MissingRequirement, match=r"reading .zst files needs zstandard: pip install 'llmkit\[data\]'"):
        list(read_file(path))


def test_a_sample_takes_from_the_beginning_of_every_file(tmp_path: Path) -> None:
    paths = [pack(tmp_path / f"{i}.txt", (str(i) * 99 + "\n").encode() * 4000) for i in range(4)]
    sample = [document.text for document in FileSource(paths).sample(200_000)]
    assert {text[0] for text in sample} == {"0", "1", "2", "3"}
    assert 200_000 <= sum(map(len, sample)) < 600_000


# --- dividing


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(splitting, "PART", 40)
    return 40


letters = st.sampled_from(["a", "b", " ", "\n", "é", "word ", END_OF_TEXT[:5]])


@settings(deadline=None)
@given(text=st.lists(letters, max_size=200).map("".join))
def test_parts_join_to_the_document(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "PART", 40)
        parts = list(split_text(text))
    assert all(0 < len(part) <= 40 and not part.isspace() for part in parts)
    if text.strip() and "  " not in text and "\n" not in text:
        assert "".join(parts) == text
    assert "".join("".join(parts).split()) == "".join(text.split())


@settings(deadline=None)
@given(documents=st.lists(st.lists(letters, min_size=1, max_size=60).map("".join), max_size=6), size=st.integers(1, 97))
def test_a_streamed_text_is_divided_at_separators_whatever_the_blocks(documents: list[str], size: int) -> None:
    text = END_OF_TEXT.join(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "PART", 40)
        parts = list(split_stream(text[i : i + size] for i in range(0, len(text), size)))
    assert all(0 < len(part) <= 40 and not part.isspace() for part in parts)
    expected = text.replace(END_OF_TEXT, "")
    assert "".join("".join(parts).split()) == "".join(expected.split())


def test_a_part_ends_at_a_newline_else_at_white_space_else_anywhere(short_parts: int) -> None:
    assert list(split_text("x" * 30 + "\n" + "y" * 30)) == ["x" * 30 + "\n", "y" * 30]
    assert list(split_text("x" * 30 + " " + "y" * 30)) == ["x" * 30 + " ", "y" * 30]
    assert list(split_text("x" * 100)) == ["x" * 40, "x" * 40, "x" * 20]


def test_a_separator_takes_the_newlines_around_it(short_parts: int) -> None:
    assert list(split_stream([f"one\n{END_OF_TEXT}\n\ntwo\n{END_OF_TEXT}\n"])) == ["one", "two"]
