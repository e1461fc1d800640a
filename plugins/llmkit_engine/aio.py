"""AsyncEngine: generations for asyncio. One background thread runs the steps, and sleeps when there are none."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Self

from llmkit.engine import Chunk, GenerateRequest
from llmkit_engine.engine import EmbeddedEngine

Event = Chunk | Exception
Sink = Callable[[Event], None]


class AsyncEngine:
    """Streams for many coroutines, of any number of event loops, from one `EmbeddedEngine`.

    The engine may be used directly at the same time. Use as a context manager, or call `close`.
    """

    def __init__(self, engine: EmbeddedEngine) -> None:
        """Start the thread. The engine stays the caller's: `close` ends the thread only."""
        self.engine = engine
        self._wake = threading.Condition()
        self._todo: deque[Callable[[], None]] = deque()  # what the thread does before its next step
        self._closing = False
        self._failed: Exception | None = None
        self._sinks: dict[int, tuple[asyncio.AbstractEventLoop, Sink]] = {}  # by the request's id
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Sink, Event]]] = {}  # of one step
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

    @property
    def failed(self) -> Exception | None:
        """The defect that ended the thread, if one did."""
        return self._failed

    def load(self) -> dict[str, float]:
        """How busy the engine is: requests that run and that wait, and the share of the cache that is in use."""
        scheduler = self.engine.scheduler
        running = scheduler.running
        return {
            "batch_size": running,
            "queue_size": max(0, len(self._sinks) + len(self._todo) - running),
            "kv_cache_usage": scheduler.blocks.used / scheduler.blocks.count,
        }

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request; `sink` gets its chunks in this coroutine's loop, or an exception as the last event.

        What a step gives for all requests of a loop comes in one callback. Raises ValueError, naming the request and
        the parameter, for one that does not fit; others go on.
        """
        self.engine.check(request)
        loop = asyncio.get_running_loop()
        # Not submitted here: a step holds the engine's lock for its duration, which the loop must not wait for.
        self._do(partial(self._submit, request, loop, sink))

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """A request's chunks as they come. Leaving the loop early, or being cancelled, cancels the request.

        Raises ValueError as `start` does.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        self.start(request, events.put_nowait)
        finished = False
        try:
            while not finished:
                event = await events.get()
                finished = isinstance(event, Exception) or event.finish_reason is not None
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if not finished:
                self.cancel(request.id)

    async def generate(self, request: GenerateRequest) -> list[Chunk]:
        """All chunks of a request."""
        return [chunk async for chunk in self.stream(request)]

    def cancel(self, request_id: int) -> None:
        """End a request with finish_reason "cancelled" at the next step; does nothing for an unknown one."""
        if not self._closing and self._failed is None:
            self._do(partial(self.engine.cancel, request_id))

    def _do(self, what: Callable[[], None]) -> None:
        with self._wake:
            if self._failed is not None or self._closing:
                raise RuntimeError("the engine was closed") from self._failed
            self._todo.append(what)
            self._wake.notify()

    # --- in the thread

    def _run(self) -> None:
        end = RuntimeError("the engine was closed")
        try:
            busy = False
            while True:
                with self._wake:
                    while not (busy or self._todo or self._closing):
                        self._wake.wait()
                    if self._closing:
                        return
                while self._todo:
                    self._todo.popleft()()
                busy = self.engine.step()
                self._deliver()
        except Exception as error:  # a defect of the engine: every stream learns of it, instead of waiting for ever
            end = RuntimeError(f"the engine failed: {error}")
            end.__cause__ = error
            with self._wake:
                self._failed = error
        finally:
            while self._todo:
                self._todo.popleft()()
            for request_id in list(self._sinks):
                self.engine.cancel(request_id)
                self._collect(request_id, end)
            self._deliver()

    def _submit(self, request: GenerateRequest, loop: asyncio.AbstractEventLoop, sink: Sink) -> None:
        if request.id in self._sinks:
            self._outbox.setdefault(loop, []).append(
                (sink, ValueError(f"request {request.id}: id is that of a request in flight"))
            )
            return
        self._sinks[request.id] = (loop, sink)
        try:
            self.engine.submit(request, partial(self._collect, request.id))
        except ValueError as error:
            self._collect(request.id, error)

    def _collect(self, request_id: int, event: Event) -> None:
        loop, sink = self._sinks[request_id]
        self._outbox.setdefault(loop, []).append((sink, event))
        if isinstance(event, Exception) or event.finish_reason is not None:
            del self._sinks[request_id]

    def _deliver(self) -> None:
        """Hand each loop what the step gave for its requests."""
        outbox, self._outbox = self._outbox, {}
        for loop, events in outbox.items():
            try:
                loop.call_soon_threadsafe(_call_all, events)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for request_id in [key for key, (other, _) in self._sinks.items() if other is loop]:
                    self.engine.cancel(request_id)


def _call_all(events: list[tuple[Sink, Event]]) -> None:
    for sink, event in events:
        sink(event)
