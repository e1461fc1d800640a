"""Metrics: what the server counts, in Prometheus's text form. One registry for each server."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmkit_http.models import Model


class Metrics:
    """Counters and histograms, updated in the event loop."""

    def first_token(self, model: Model, seconds: float) -> None: ...

    def tokens(self, model: Model, count: int) -> None: ...
