"""Evaluator `bpb`: bits per byte of text, which compares models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit import hookimpl
from llmkit.evaluator import Answer, Document, Evaluator, Likelihood, Metric, Request, RollingLogLikelihood

if TYPE_CHECKING:
    from llmkit.data.tokens import Tokens
    from llmkit.tokenizer import Tokenizer

READ_TOKENS = 2**20  # taken from a shard at once


class BitsPerByte(Evaluator):
    """Bits per byte of the validation split of a model's own data, or of any text (--data)."""

    name = "bpb"
    version = "1"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"bpb": False}

    def documents(self) -> Iterable[Document]:
        """Documents of the place that `--data` names, else of the data that the checkpoint was trained on."""
        given = self.context.options.get("data")
        place = given or self.context.checkpoint.provenance.get("data", {}).get("path")
        if place is None:
            raise ValueError(
                f"checkpoint {self.context.checkpoint.path} does not say what it was trained on: "
                "name a text file or data folder with --data"
            )
        path = Path(place).expanduser()
        if given is None or (path / "meta.json").is_file():
            return _Validation(path)
        if path.suffix == ".bin" and path.is_file():  # alone it does not say by which tokenizer: the model's, then
            from llmkit.data.shards import open_shard

            return _decoded([open_shard(path)], self.context.tokenizer.eot_id, self.context.tokenizer)
        from llmkit.data.readers import open_source

        return ({"text": document.text} for document in open_source(place).documents())

    def requests(self, document: Document) -> list[Request]:
        return [RollingLogLikelihood(document["text"])]

    def score(self, document: Document, answers: Sequence[Answer]) -> dict[str, float]:
        (answer,) = answers
        assert isinstance(answer, Likelihood)
        return {"bits": -answer.logprob / math.log(2), "bytes": float(len(document["text"].encode("utf-8")))}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
        """All bits over all bytes; the standard error is that of a ratio of two sums (linearised)."""
        n = len(scores)
        if not n:
            return {}
        total = math.fsum(score["bytes"] for score in scores)
        if not total:
            raise ValueError("task 'bpb': the text is empty")
        ratio = math.fsum(score["bits"] for score in scores) / total
        if n < 2:
            return {"bpb": Metric(ratio)}
        residual = math.fsum((score["bits"] - ratio * score["bytes"]) ** 2 for score in scores)
        return {"bpb": Metric(ratio, math.sqrt(residual * n / (n - 1)) / total)}


class _Validation:
    """The documents of a data folder's validation split, decoded by the tokenizer that made the tokens."""

    def __init__(self, path: Path) -> None:
        from llmkit.data.tokens import TokenData

        self._data = TokenData(path)
        self._tokenizer = self._data.tokenizer

    def __len__(self) -> int:
        return self._data.splits["val"].documents

    def __iter__(self) -> Iterator[Document]:
        return _decoded(self._data.shards("val"), self._data.eot_id, self._tokenizer)


def _decoded(shards: Iterable[Tokens], eot_id: int | None, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents in token shards as text; one may run on into the next shard."""
    document: list[int] = []
    for shard in shards:
        for start in range(0, len(shard), READ_TOKENS):
            for token in shard[start : start + READ_TOKENS].tolist():
                if token != eot_id:
                    document.append(token)
                elif document:
                    yield {"text": tokenizer.decode(document)}
                    document = []
    if document:
        yield {"text": tokenizer.decode(document)}


@hookimpl
def llmkit_register_evaluators() -> list[type[Evaluator]]:
    return [BitsPerByte]
