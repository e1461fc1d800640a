"""Model: a checkpoint that is served, its engine and its names; Models: those of one server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from llmkit.checkpoint import Checkpoint
from llmkit.engine import Chunk, Engine, GenerateRequest
from llmkit.engines import open_engine
from llmkit_http.errors import APIError, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmkit_http.constraints import Grammars
    from llmkit_http.options import HttpOptions

    Event = Chunk | Exception
    Sink = Callable[[Event], None]


class Streams(Protocol):
    """What runs the generations of an engine for the event loop: `AsyncEngine`, or `ThreadedEngine` for others."""

    @property
    def engine(self) -> Engine: ...

    def start(self, request: GenerateRequest, sink: Sink) -> None: ...

    def cancel(self, request_id: int) -> None: ...

    def close(self) -> None: ...

    def load(self) -> dict[str, float]: ...

    @property
    def failed(self) -> Exception | None: ...


@dataclass(frozen=True)
class Model:
    """A checkpoint with its running engine. `names`: its own first, then its aliases."""

    names: tuple[str, ...]
    checkpoint: Checkpoint
    streams: Streams
    created: int

    @property
    def engine(self) -> Engine:
        return self.streams.engine

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a longer text than this for each token of the context cannot fit."""
        tokenizer = self.checkpoint.tokenizer
        return max(len(tokenizer.decode_bytes([index])) for index in range(tokenizer.vocab_size))

    @cached_property
    def grammars(self) -> Grammars:
        """For constraints; made when the first is asked for. Raises APIError where the model cannot have any."""
        from llmkit_http.constraints import Grammars

        return Grammars(self.checkpoint.tokenizer, self.engine)

    @classmethod
    def load(cls, names: tuple[str, ...], checkpoint: Checkpoint, options: HttpOptions) -> Model:
        """Open the engine that the options name. Raises what `open_engine` and the checkpoint's tokenizer do."""
        tokenizer = checkpoint.tokenizer  # first, since it may be missing
        assert tokenizer.vocab_size
        engine = open_engine(
            checkpoint, options.engine, dtype=options.dtype, device=options.device, quantize=options.quantize
        )
        return cls(names, checkpoint, _streams(engine), int(time.time()))

    def close(self) -> None:
        self.streams.close()
        self.engine.close()


def _streams(engine: Engine) -> Streams:
    if engine.name == "llmkit":
        from llmkit_engine.aio import AsyncEngine
        from llmkit_engine.engine import EmbeddedEngine

        assert isinstance(engine, EmbeddedEngine)
        return AsyncEngine(engine)
    from llmkit_http.threaded import ThreadedEngine

    return ThreadedEngine(engine)


class Models:
    """The models of a server, by name. `state` is loading, ready, draining or failed."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._groups: list[tuple[tuple[str, ...], Checkpoint]] = []
        for checkpoint in {id(c): c for c in checkpoints.values()}.values():
            names = tuple(name for name, other in checkpoints.items() if other is checkpoint)
            self._groups.append((names, checkpoint))
        self._default = next(iter(checkpoints))
        self._by_name: dict[str, Model] = {}
        self.state = "loading"

    def __iter__(self) -> Iterator[Model]:
        return iter({id(model): model for model in self._by_name.values()}.values())

    def load(self, options: HttpOptions) -> None:
        """Open all engines. Raises what `Model.load` does, with nothing left open."""
        try:
            for names, checkpoint in self._groups:
                model = Model.load(names, checkpoint, options)
                self._by_name.update(dict.fromkeys(names, model))
        except BaseException:
            self.close()
            raise
        self.state = "ready"

    def close(self) -> None:
        for model in self:
            model.close()
        self._by_name.clear()

    @property
    def status(self) -> str:
        """`state`, but failed where an engine is."""
        return "failed" if any(model.streams.failed for model in self) else self.state

    @property
    def default(self) -> Model:
        return self.find(self._default)

    def find(self, name: str | None) -> Model:
        """The model of a name, the first where none is given. Raises APIError."""
        self.check_ready()
        model = self._by_name.get(name or self._default)
        if model is None:
            known = ", ".join(self._by_name)
            raise APIError(
                404, f"The model '{name}' does not exist (there are: {known}).", param="model", code="model_not_found"
            )
        return model

    def named(self) -> list[tuple[str, Model]]:
        """Every name with its model. Raises APIError unless ready."""
        self.check_ready()
        return list(self._by_name.items())

    def check_ready(self) -> None:
        if (status := self.status) != "ready":
            raise unavailable(f"The server is not ready: {status}.", 5 if status == "failed" else 1)
