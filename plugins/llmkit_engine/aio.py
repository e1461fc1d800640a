"""AsyncEngine: generations for asyncio. One background thread runs the steps, and sleeps when there are none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Self

from llmkit.engine import Chunk, GenerateRequest
from llmkit_engine.engine import EmbeddedEngine

Event = Chunk | Exception


class AsyncEngine:
    """Streams for many coroutines, of any number of event loops, from one `EmbeddedEngine`.

    The engine may be used directly at the same time. Use as a context manager, or call `close`.
    """

    def __init__(self, engine: EmbeddedEngine) -> None:
        """Start the thread. The engine stays the caller's: `close` ends the thread only."""
        self.engine = engine
        self._wake = threading.Condition()
        self._work = False  # whether there may be something to do
        self._closing = False
        self._failed: Exception | None = None
        self._sinks: set[Callable[[Event], None]] = set()
        self._thread = threading.Thread(target=self._run, name="llmkit-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread after its step. Streams that still run raise RuntimeError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        for sink in list(self._sinks):
            sink(RuntimeError("the engine was closed"))

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """A request's chunks as they come. Leaving the loop early, or being cancelled, cancels the request.

        Raises ValueError, naming the request and the parameter, for one that does not fit; others go on.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:  # called by the engine's thread
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.engine.cancel(request.id)

        if self._failed is not None or self._closing:
            raise RuntimeError("the engine was closed") from self._failed
        # A step holds the engine's lock for its duration: a queueing coroutine must not hold up the loop for that long.
        await asyncio.to_thread(self.engine.submit, request, sink)
        self._sinks.add(sink)
        self._notify()
        finished = False
        try:
            while not finished:
                event = await events.get()
                finished = isinstance(event, Exception) or event.finish_reason is not None
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self._sinks.discard(sink)
            if not finished:
                self.cancel(request.id)

    async def generate(self, request: GenerateRequest) -> list[Chunk]:
        """All chunks of a request."""
        return [chunk async for chunk in self.stream(request)]

    def cancel(self, request_id: int) -> None:
        """End a request with finish_reason "cancelled" at the next step; does nothing for an unknown one."""
        self.engine.cancel(request_id)
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._work = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._work or self._closing)
                    if self._closing:
                        return
                    self._work = False
                while self.engine.step() and not self._closing:
                    pass
        except Exception as error:  # a defect of the engine: every stream learns of it, instead of waiting for ever
            self._failed = error
            for sink in list(self._sinks):
                sink(error)
