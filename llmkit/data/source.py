"""DataSource: where text documents come from, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from llmkit.component import Component


@dataclass(frozen=True, slots=True)
class Text:
    """One document. `position` is how far the source has been read, in [0, 1], or None where that is not known."""

    text: str
    position: float | None = None


class DataSource(Component, ABC):
    """A named source of text documents."""

    @abstractmethod
    def documents(self) -> Iterator[Text]:
        """The documents, streamed, always in the same order. Raises ValueError or OSError where it cannot be had."""

    def validation_documents(self) -> Iterator[Text] | None:
        """The source's own validation split, or None: then documents are held out from `documents`."""
        return None
