"""FileSource: documents of .txt, .jsonl and .parquet files, plain or compressed (.gz, .zst), read as a stream.

`open_source` finds what a SOURCE argument of `llmkit data prepare` means: a named source, files, or a dataset.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llmkit.component import nearest, require
from llmkit.data.source import DataSource, Text
from llmkit.data.split import split_stream

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_BLOCK = 1 << 20  # bytes read at once
_ROWS = 256  # rows of a parquet file decoded at once
FORMATS = ".txt, .jsonl or .parquet, plain or with .gz or .zst behind it"


class FileSource(DataSource):
    """Documents of files, in the order given. `text_field` is the JSON key, or parquet column, that holds the text."""

    name = "files"

    def __init__(self, paths: Sequence[Path], *, text_field: str = "text") -> None:
        """Raises ValueError for a file of a kind that is not read."""
        self.paths, self.text_field = list(paths), text_field
        for path in self.paths:
            if file_kind(path) is None:
                raise ValueError(f"{path} is no text file that llmkit reads: {FORMATS}")
        self.sizes = [path.stat().st_size for path in self.paths]
        self.size = sum(self.sizes)

    def documents(self) -> Iterator[Text]:
        """The documents, .txt files in parts (see `llmkit.data.split`). Raises ValueError for damaged content."""
        done = 0
        for path, size in zip(self.paths, self.sizes):
            for document in read_file(path, self.text_field):
                yield Text(document.text, (done + size * (document.position or 0.0)) / max(self.size, 1))
            done += size

    def sample(self, characters: int) -> Iterator[Text]:
        """About `characters` from the beginnings of all files, each in proportion to its size."""
        for path, size in zip(self.paths, self.sizes):
            left = characters * size / max(self.size, 1)
            for document in read_file(path, self.text_field):
                yield document
                left -= len(document.text)
                if left <= 0:
                    break


def file_kind(path: Path) -> str | None:
    """`.txt`, `.jsonl` or `.parquet`, whatever the compression; None for a file of another kind."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def find_files(spec: str) -> list[Path]:
    """The files that a path, folder or glob names: sorted, folders searched to any depth, hidden files left out.

    Raises ValueError where there are none.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file_kind(file) and not _hidden(file, path)]
        if not found:
            raise ValueError(f"no text files in {path}: llmkit reads {FORMATS}")
        return sorted(found)
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    found = [file for file in matches if file.is_file() and file_kind(file)]
    if not found:
        raise ValueError(f"no text files match {spec!r}: llmkit reads {FORMATS}")
    return sorted(found)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def open_source(spec: str, *, text_field: str | None = None) -> DataSource:
    """What a SOURCE argument means: `hf:<dataset>[:config]`, a named source, a file, a folder or a glob.

    A name comes before a file of the same name (`./stdlib` is the file). Raises UnknownComponent, with the nearest
    names, where it is none of these, ValueError where it names no text files, and MissingRequirement where a module
    that the source needs is not installed.
    """
    from llmkit.plugins import UnknownComponent, get_plugins

    field = text_field or "text"
    if spec.startswith("hf:"):
        from llmkit.data.hub import HubSource

        require(HubSource.requires, f"data source {spec!r}")
        return HubSource.parse(spec, text_field=field)
    names = get_plugins().names("data source")
    if spec in names:
        source = get_plugins().data_source(spec)
        require(source.requires, f"data source {spec!r}")
        return source()
    if Path(spec).expanduser().exists() or glob.has_magic(spec):
        return FileSource(find_files(spec), text_field=field)
    raise UnknownComponent(f"there is no file, folder or data source {spec!r}: {nearest(spec, names)}")


def read_file(path: Path, text_field: str = "text") -> Iterator[Text]:
    """The documents of one file; `position` is how much of this file has been read."""
    kind = file_kind(path)
    assert kind is not None
    with open_stream(path) as (stream, raw):
        size = max(path.stat().st_size, 1)
        if kind == ".parquet":
            yield from _read_parquet(path, stream, text_field)
            return
        texts = split_stream(_decoded(path, stream)) if kind == ".txt" else _read_jsonl(path, stream, text_field)
        for text in texts:
            yield Text(text, min(raw.tell() / size, 1.0))


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(stream of the file's content, the file itself). Raises ValueError for damaged compressed data."""
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        try:
            if suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield cast(IO[bytes], unpacked), raw
            elif suffix == ".zst":
                require(("zstandard",), "reading .zst files")
                with io.BufferedReader(_ZstdStream(path, raw), _BLOCK) as unpacked_zst:
                    yield unpacked_zst, raw
            else:
                yield raw, raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged, or no gzip file: {error}") from None


class _ZstdStream(io.RawIOBase):
    """The content of a .zst file; unlike the library's own reader, it notices that the file ends in a frame."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        import zstandard

        self._library = zstandard
        self._path, self._raw = path, raw
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(_BLOCK >> 6)  # little, as it may unpack to much
            if not self._packed:
                if self._frame is not None:
                    raise ValueError(f"{self._path} is damaged: it ends before its content does")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._library.ZstdError as error:
                raise ValueError(f"{self._path} is damaged, or no zstandard file: {error}") from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decoded(path: Path, stream: IO[bytes]) -> Iterator[str]:
    """Text of a UTF-8 stream, block by block, a byte order mark left out. Raises ValueError with the offset."""
    import codecs

    pending, offset = b"", 0
    while True:
        block = stream.read(_BLOCK)
        data = pending + block
        if offset == 0 and data.startswith(codecs.BOM_UTF8):
            data, offset = data[3:], 3
        try:
            text, used = codecs.utf_8_decode(data, "strict", not block)
        except UnicodeDecodeError as error:
            raise not_utf8(path, data, offset, error) from None
        yield text
        if not block:
            return
        pending, offset = data[used:], offset + used


def not_utf8(path: Path, data: bytes, offset: int, error: UnicodeDecodeError) -> ValueError:
    """The error for text that is not UTF-8; `offset` is where `data` begins in the file."""
    place = offset + error.start
    return ValueError(
        f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {place}; "
        "convert it first, for example with: iconv -f LATIN1 -t UTF-8"
    )


def _read_jsonl(path: Path, stream: IO[bytes], field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        begin, offset = offset, offset + len(line)
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, line, begin, error) from None
        place = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{place}: this is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object with a field {field!r}, not {type(row).__name__}")
        value = field_of(row, field, place)
        if "\\ud" in text or "\\uD" in text:  # JSON can escape half of a surrogate pair, which UTF-8 cannot hold
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield value


def field_of(row: dict[str, Any], field: str, place: str) -> str:
    """The text in a row. Raises ValueError, which begins with `place`, where it is missing or no string."""
    if field not in row:
        raise ValueError(f"{place}: {_no_field(field, row)}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: field {field!r} holds {'null' if value is None else type(value).__name__}, not text"
        )
    return value


def _no_field(field: str, fields: Iterable[str]) -> str:
    return f"there is no field {field!r}, but {', '.join(map(repr, fields)) or 'none at all'}; choose with --text-field"


def _read_parquet(path: Path, stream: IO[bytes], field: str) -> Iterator[Text]:
    require(("pyarrow",), "reading .parquet files")
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        if path.suffix.lower() in COMPRESSIONS:  # parquet is read from its end, so a compressed one is unpacked first
            while block := stream.read(_BLOCK):
                unpacked.write(block)
            stream = unpacked
        try:
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=_BLOCK, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged, or no parquet file: {_first_line(error)}") from None
        if field not in file.schema_arrow.names:
            raise ValueError(f"{path}: {_no_field(field, file.schema_arrow.names)}")
        total, row = max(file.metadata.num_rows, 1), 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield Text(field_of({field: value.as_py()}, field, f"{path}, row {row}"), row / total)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, row {row}: field {field!r} is not UTF-8: {error.reason}") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged behind row {row}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0]
