"""ThreadedEngine: any engine for asyncio. A thread runs the requests that wait, all together, then the next ones."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from llmkit.engine import Chunk, Engine, GenerateRequest

Event = Chunk | Exception
Sink = Callable[[Event], None]


class ThreadedEngine:
    """The interface of `llmkit_engine.aio.AsyncEngine` for an engine that has none.

    Such an engine takes requests only when it begins, so a request waits until those before it are done.
    """

    def __init__(self, engine: Engine) -> None:
        """Start the thread. The engine stays the caller's."""
        self.engine = engine
        self._wake = threading.Condition()
        self._waiting: deque[tuple[GenerateRequest, asyncio.AbstractEventLoop, Sink]] = deque()
        self._cancelled: set[int] = set()
        self._closing = False
        self._failed: Exception | None = None
        self.running = 0
        self._thread = threading.Thread(target=self._run, name="llmkit-engine", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> Exception | None:
        """The defect that ended the thread, if one did."""
        return self._failed

    def load(self) -> dict[str, float]:
        """How many requests run and wait."""
        return {"batch_size": self.running, "queue_size": len(self._waiting)}

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request, whose chunks go to `sink` in the running event loop. Raises ValueError."""
        self.engine.check(request)
        with self._wake:
            if self._closing or self._failed is not None:
                raise RuntimeError("the engine was closed") from self._failed
            self._waiting.append((request, asyncio.get_running_loop(), sink))
            self._wake.notify()

    def cancel(self, request_id: int) -> None:
        """End a request with finish_reason "cancelled" when its next chunk is due."""
        with self._wake:
            self._cancelled.add(request_id)

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing)
                batch = {request.id: (request, loop, sink) for request, loop, sink in self._waiting}
                self._waiting.clear()
                self._cancelled &= set(batch)  # others have ended before they were cancelled
            open_ids = set(batch)
            end: Exception = RuntimeError("the engine was closed")
            try:
                if not self._closing:
                    self._run_batch(batch, open_ids)
            except Exception as error:  # a defect of the engine: every stream learns of it
                end = RuntimeError(f"the engine failed: {error}")
                end.__cause__ = error
                with self._wake:
                    self._failed = error
                    waiting = {request.id: (request, loop, sink) for request, loop, sink in self._waiting}
                    batch, open_ids = batch | waiting, open_ids | set(waiting)
            for request_id in open_ids:
                _, loop, sink = batch[request_id]
                _deliver(loop, sink, end)
            if self._closing or self._failed is not None:
                return

    def _run_batch(
        self, batch: dict[int, tuple[GenerateRequest, asyncio.AbstractEventLoop, Sink]], open_ids: set[int]
    ) -> None:
        self.running = len(open_ids)
        try:
            for chunk in self.engine.generate([request for request, _, _ in batch.values()]):
                _, loop, sink = batch[chunk.id]
                if chunk.finish_reason is not None:
                    open_ids.discard(chunk.id)
                    self.running -= 1
                _deliver(loop, sink, chunk)
                for request_id in open_ids & (open_ids if self._closing else self._cancelled):
                    self.engine.cancel(request_id)
        finally:
            self.running = 0


def _deliver(loop: asyncio.AbstractEventLoop, sink: Sink, event: Event) -> None:
    try:
        loop.call_soon_threadsafe(sink, event)
    except RuntimeError:  # the loop is closed: nobody listens any more
        pass
