"""HubSource: documents of a Hugging Face dataset, streamed through the `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from llmkit.data.source import DataSource, Text


class HubSource(DataSource):
    """A dataset of the hub, or a local folder in its layout. Subclasses set the attributes to name one.

    Attributes:
        dataset: hub id, or path of a folder.
        config: name of its configuration, or None for its default one.
        validation_split: name of the split that is its validation text, or None.
        text_field: column that holds the text.
    """

    requires = ("datasets",)
    dataset: str = ""
    config: str | None = None
    validation_split: str | None = None
    text_field: str = "text"

    @classmethod
    def parse(cls, spec: str, *, text_field: str) -> HubSource:
        """The source for `hf:<dataset>[:config]`. Raises ValueError for another form."""
        dataset, _, config = spec.removeprefix("hf:").partition(":")
        if not dataset:
            raise ValueError(f"{spec!r} names no dataset: write hf:<dataset> or hf:<dataset>:<config>")
        source = cls()
        source.dataset, source.config, source.text_field = dataset, config or None, text_field
        return source

    def documents(self) -> Iterator[Text]:
        return self._stream("train")

    def validation_documents(self) -> Iterator[Text] | None:
        return None if self.validation_split is None else self._stream(self.validation_split)

    def _stream(self, split: str) -> Iterator[Text]:
        """The rows of a split. Raises ValueError where the dataset cannot be had or has no such text."""
        from llmkit.data.readers import field_of

        rows, count = self._open(split)
        place = f"dataset {self.dataset!r}"
        for number, row in enumerate(self._guarded(rows, place), start=1):
            text = field_of(row, self.text_field, f"{place}, split {split}, row {number}")
            yield Text(text, min(number / count, 1.0) if count else None)

    def _open(self, split: str) -> tuple[Any, int | None]:
        """The streamed rows and, where the dataset says it, their number."""
        import datasets

        datasets.utils.logging.set_verbosity_error()
        try:
            rows = datasets.load_dataset(self.dataset, self.config, split=split, streaming=True)
        except Exception as error:  # the library raises many kinds, from its own to those of its HTTP client
            raise self._unavailable(error) from error
        if rows.column_names and self.text_field in rows.column_names:
            rows = rows.select_columns([self.text_field])  # the others need not be read
        known = (rows.info.splits or {}).get(split)
        return rows, known.num_examples if known is not None and known.num_examples else None

    def _guarded(self, rows: Any, place: str) -> Iterator[dict[str, Any]]:
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise ValueError(f"{place} cannot be read on: {_first_line(error)}") from error
            yield row

    def _unavailable(self, error: Exception) -> ValueError:
        place = f"dataset {self.dataset!r}" + (f", configuration {self.config!r}," if self.config else "")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            advice = "HF_HUB_OFFLINE is set: unset it, name a local folder as hf:FOLDER, or prepare `stdlib`"
        else:
            advice = "check its name and the network, name a local folder as hf:FOLDER, or prepare `stdlib`"
        return ValueError(f"{place} cannot be had ({_first_line(error)}): {advice}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
