"""TaskData: where the documents of an evaluation task come from, local files or the hub, checked field by field."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmkit.component import install_hint, missing_modules

Row = Mapping[str, Any]
T = TypeVar("T")
D = TypeVar("D")


class MissingData(ValueError):
    """A task's data cannot be had here: no local file, or no way to the hub. Data that is damaged is a ValueError."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """The data of a task.

    Attributes:
        file: path under `--data-dir`, with `{split}` where the split's name belongs; gzipped with .gz behind it.
        dataset: id on the hub.
        config: name of the dataset's configuration, or None for its default one.
    """

    file: str
    dataset: str
    config: str | None = None

    def load(
        self, split: str, data_dir: Path | None, convert: Callable[[Row], D], files: Mapping[str, Path] | None = None
    ) -> list[D]:
        """The rows of a split, each turned into a document by `convert`.

        They come from the split's file in `files`, else from `data_dir`, else, where that is None, from the hub.
        Raises MissingData where there is none, and ValueError, naming file and line (or dataset and row), for data that
        is damaged or that `convert` refuses.
        """
        if files and split in files:
            rows = json_lines(files[split])
        else:
            rows = self._hub(split) if data_dir is None else self._local(split, data_dir)
        documents = []
        for place, row in rows:
            try:
                documents.append(convert(row))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        return documents

    def _local(self, split: str, data_dir: Path) -> Iterator[tuple[str, Row]]:
        path = self.find(split, data_dir)
        if path is None:
            expected = data_dir / self.file.format(split=split)
            raise MissingData(f"there is no {expected} (or {expected.name}.gz), where split {split!r} should be")
        return json_lines(path)

    def find(self, split: str, data_dir: Path) -> Path | None:
        """The local file of a split, where there is one."""
        path = data_dir / self.file.format(split=split)
        packed = path.with_name(path.name + ".gz")
        return path if path.is_file() else packed if packed.is_file() else None

    def _hub(self, split: str) -> Iterator[tuple[str, Row]]:
        """Rows through the `datasets` library, which keeps what it downloads."""
        local = f"or give local files with --data-dir DIR: DIR/{self.file.format(split=split)}"
        if missing_modules(["datasets"]):
            raise MissingData(f"dataset {self.dataset!r} needs datasets: {install_hint(['datasets'])}, {local}")
        import datasets

        datasets.utils.logging.set_verbosity_error()
        place = f"dataset {self.dataset!r}, split {split}"
        try:
            rows = datasets.load_dataset(self.dataset, self.config, split=split)
        except Exception as error:  # the library raises many kinds, from its own to those of its HTTP client
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise MissingData(f"{place} cannot be had ({reason}): check the network, {local}") from error
        for number, row in enumerate(rows, start=1):
            yield f"{place}, row {number}", row


def json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects in a file of JSON lines, .gz or not, each with its place. Raises ValueError naming file and line."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        lines = iter(file)
        number = 0
        while True:
            number += 1
            place = f"{path}, line {number}"
            try:
                line = next(lines, None)
                if line is None:
                    return
                row = json.loads(line) if line.strip() else None
            except (EOFError, OSError) as error:
                raise ValueError(f"{place}: the file is damaged or cut short ({error})") from None
            except ValueError as error:
                raise ValueError(f"{place} is not JSON ({error})") from None
            if row is None and not line.strip():
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{place} is not a JSON object")
            yield place, row


def get(row: Row, name: str, kind: type[T]) -> T:
    """Field `name` of a row. Raises ValueError where it is missing or of another kind."""
    if name not in row:
        raise ValueError(f"field {name!r} is missing: there are {', '.join(map(repr, row)) or 'no fields'}")
    value = row[name]
    if not isinstance(value, kind):
        raise ValueError(f"field {name!r} is {type(value).__name__}, not {kind.__name__}")
    return value


def get_strings(row: Row, name: str) -> list[str]:
    """Field `name`, a list of strings that is not empty."""
    values: list[Any] = get(row, name, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name!r} is not a list of texts")
    return values


def draw(pool: Sequence[D], count: int, seed: int, key: str, exclude: Iterable[D] = ()) -> list[D]:
    """`count` examples for the document that `key` stands for, the same whatever else is asked, in whatever order.

    None equals one in `exclude`. Raises ValueError where the pool has too few.
    """
    excluded = list(exclude)
    if len(pool) < count:
        raise ValueError(f"{count} examples are wanted, and there are {len(pool)} to draw from")
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    chance = random.Random(int.from_bytes(digest, "little"))
    extra = min(len(excluded), len(pool) - count)
    drawn = [example for example in chance.sample(pool, count + extra) if example not in excluded][:count]
    if len(drawn) < count:  # the document stands in the pool more than once
        rest = [example for example in pool if example not in excluded]
        return draw(rest, count, seed, key)
    return drawn
