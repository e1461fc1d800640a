"""Data sources by name: `stdlib` needs no network; the others are public corpora, streamed or downloaded once."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit import hookimpl
from llmkit.data.hub import HubSource
from llmkit.data.source import DataSource, Text


class Stdlib(DataSource):
    """The running Python's documentation topics and the source of its standard library: offline, about 11 MB."""

    name = "stdlib"

    def documents(self) -> Iterator[Text]:
        from llmkit_sources.stdlib import documents

        return documents()


class TinyShakespeare(DataSource):
    """Shakespeare's plays, 1.1 MB, downloaded once."""

    name = "tinyshakespeare"

    def documents(self) -> Iterator[Text]:
        from llmkit_sources.tinyshakespeare import documents

        return documents()


class TinyStories(HubSource):
    """Short stories for children, about 2 GB, with a validation split (roneneldan/TinyStories)."""

    name = "tinystories"
    dataset = "roneneldan/TinyStories"
    validation_split = "validation"


class FineWeb(HubSource):
    """Web text, the sample of 10 billion tokens (HuggingFaceFW/fineweb)."""

    name = "fineweb"
    dataset = "HuggingFaceFW/fineweb"
    config = "sample-10BT"


class FineWebEdu(HubSource):
    """Educational web text, the sample of 10 billion tokens (HuggingFaceFW/fineweb-edu)."""

    name = "fineweb-edu"
    dataset = "HuggingFaceFW/fineweb-edu"
    config = "sample-10BT"


class ClimbMix(HubSource):
    """A mixture of web text for pretraining, 400 billion tokens, shuffled (karpathy/climbmix-400b-shuffle)."""

    name = "climbmix"
    dataset = "karpathy/climbmix-400b-shuffle"


@hookimpl
def llmkit_register_data_sources() -> list[type[DataSource]]:
    return [Stdlib, TinyShakespeare, TinyStories, FineWeb, FineWebEdu, ClimbMix]
