"""Answers that Ctrl-C can interrupt at any moment: the model works in a thread, the terminal in the main one."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator

from llmkit_chat.models import Part

TICK = 0.1  # seconds


class Interrupted(Exception):
    """Ctrl-C came while the model was answering."""


def interruptible(start: Callable[[threading.Event], Iterator[Part]]) -> Iterator[Part]:
    """The parts that `start(cancelled)` gives, and empty ones while none comes, so that a display can move.

    Raises Interrupted at Ctrl-C, whatever the model is doing then. The signal never reaches the model's code: it sets
    `cancelled`, and the model ends at its next part. To be called from the main thread, whose handler of SIGINT is put
    back at the end.
    """
    cancelled = threading.Event()
    # A SimpleQueue may be put to by a signal handler while its reader waits.
    parts: queue.SimpleQueue[Part | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for part in start(cancelled):
                parts.put(part)
            parts.put(None)
        except BaseException as error:
            parts.put(error)

    def interrupt(*_: object) -> None:
        cancelled.set()
        parts.put(Interrupted())

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        threading.Thread(target=work, daemon=True).start()
        while True:
            try:
                part = parts.get(timeout=TICK)
            except queue.Empty:
                part = Part()
            if part is None:
                return
            if isinstance(part, BaseException):
                raise part
            if cancelled.is_set():
                raise Interrupted
            yield part
    finally:
        cancelled.set()
        signal.signal(signal.SIGINT, before)
