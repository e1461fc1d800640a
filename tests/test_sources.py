"""Named data sources and datasets: the offline one is real, the others are streamed or say what is missing."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import urllib.error
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.hub import HubSource
from llmkit.data.prepare import prepare
from llmkit.data.readers import open_source
from llmkit.data.source import DataSource
from llmkit.data.tokens import TokenData
from llmkit.plugins import get_plugins
from llmkit.testing.data import DataSourceContract

DATASETS = ["tinystories", "fineweb", "fineweb-edu", "climbmix"]


class TestStdlib(DataSourceContract):
    @pytest.fixture
    def source(self) -> DataSource:
        return open_source("stdlib")


class TestFiles(DataSourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> DataSource:
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        (tmp_path / "b.txt").write_text("three")
        return open_source(str(tmp_path))


def test_stdlib_is_documentation_and_source_in_a_fixed_order() -> None:
    source = get_plugins().data_source("stdlib")()
    documents = list(source.documents())
    texts = [document.text for document in documents]
    assert texts == [document.text for document in source.documents()]
    assert sum(map(len, texts)) > 5_000_000
    assert any("class OrderedDict" in text for text in texts)
    positions = [document.position or 0.0 for document in documents]
    assert positions == sorted(positions)
    assert 0.99 < positions[-1] <= 1
    assert not any("site-packages" in text[:200] for text in texts)


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="checked for the Pythons that ship pydoc topics")
def test_stdlib_begins_with_the_documentation_topics() -> None:
    first = next(get_plugins().data_source("stdlib")().documents()).text
    assert "assert" in first and "import " not in first[:50]


def test_stdlib_reads_a_zipped_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit_sources import stdlib

    version = f"{sys.version_info.major}{sys.version_info.minor}"
    with zipfile.ZipFile(tmp_path / f"python{version}.zip", "w") as archive:
        archive.writestr("os.py", "import sys  # zipped\n")
        archive.writestr("test/test_os.py", "left out\n")
        archive.writestr("latin.py", b"# -*- coding: latin-1 -*-\n# \xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(stdlib, "_topics", lambda: ["topic"])
    assert [document.text for document in stdlib.documents()] == ["topic", "import sys  # zipped\n"]


def test_stdlib_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit_sources import stdlib

    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"standard library is not at .*install Python with its \.py files"):
        list(stdlib.documents())


def test_tinyshakespeare_is_downloaded_once_and_checked(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (test_data / "text" / "tinyshakespeare" / "input.txt").read_bytes()
    asked: list[str] = []

    def respond(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content if len(asked) > 1 else b"an error page")

    monkeypatch.setenv("LLMKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", respond)
    source = open_source("tinyshakespeare")
    with pytest.raises(ValueError, match="checksum is wrong"):
        list(source.documents())
    for _ in range(2):
        assert "".join(document.text for document in source.documents()).encode() == content
    assert len(asked) == 2


def test_tinyshakespeare_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("LLMKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match=r"Name or service not known.*prepare `stdlib`, or put the file at"):
        list(open_source("tinyshakespeare").documents())


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_are_named_and_need_the_library(name: str) -> None:
    source = get_plugins().data_source(name)
    assert issubclass(source, HubSource)
    assert source.requires == ("datasets",)
    assert "/" in source.dataset


def test_the_plugins_and_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, llmkit_sources, llmkit_tokenizers, llmkit.cli.data, llmkit.cli.tokenizer;"
        "print([m for m in ('numpy', 'datasets', 'pyarrow', 'tokenizers', 'tiktoken') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture
def dataset(test_data: Path, tmp_path: Path) -> Path:
    pytest.importorskip("datasets")
    folder = tmp_path / "novels"
    folder.mkdir()
    shutil.copyfile(test_data / "text" / "novels" / "val.parquet", folder / "train.parquet")
    return folder


def test_a_local_folder_is_a_dataset(dataset: Path) -> None:
    import pyarrow.parquet as pq

    source = open_source(f"hf:{dataset}")
    expected = pq.read_table(dataset / "train.parquet")["text"].to_pylist()
    assert [document.text for document in islice(source.documents(), 5)] == expected[:5]


def test_a_dataset_is_prepared(dataset: Path, tmp_path: Path) -> None:
    meta = prepare([f"hf:{dataset}"], tmp_path / "data", tokenizer="byte", workers=1)
    assert TokenData(tmp_path / "data").splits["val"].tokens > 0
    assert meta["sources"] == [f"hf:{dataset}"]


def test_a_datasets_own_validation_split_is_used(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "train.parquet").unlink()
    (dataset / "train.txt").write_text("first line\nsecond line\n")
    (dataset / "validation.txt").write_text("a held out line\n")
    monkeypatch.setattr(get_plugins().data_source("tinystories"), "dataset", str(dataset))
    meta = prepare(["tinystories"], tmp_path / "data", tokenizer="byte", workers=1)
    assert meta["train"]["documents"] == 2
    assert meta["val"]["bytes"] == len("a held out line")


def test_a_dataset_without_the_field_says_which_it_has(dataset: Path) -> None:
    source = open_source(f"hf:{dataset}", text_field="body")
    with pytest.raises(ValueError, match=r"row 1: there is no field 'body', but .*'text'.*--text-field"):
        list(source.documents())


def test_a_dataset_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"dataset 'nobody/nothing' cannot be had \(.*HF_HUB_OFFLINE is set") as caught:
        list(open_source("hf:nobody/nothing").documents())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"dataset '.*', configuration 'other', cannot be had"):
        list(open_source(f"hf:{tmp_path}:other").documents())
