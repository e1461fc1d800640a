"""Metrics: what the server counts, in Prometheus's text form. One registry for each server."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from llmkit_http.limits import Admission
    from llmkit_http.models import Model, Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
RATE_SECONDS = 10.0  # over which tokens a second are averaged


class Metrics:
    """Counters and histograms, updated in the event loop; what engines know is asked when it is read."""

    def __init__(self, models: Models, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        labels = ["model"]
        self._requests = Counter(
            "llmkit_http_requests", "HTTP requests answered.", ["path", "status"], registry=self.registry
        )
        self._generated = Counter("llmkit_generated_tokens", "Tokens generated.", labels, registry=self.registry)
        self._prompt = Counter("llmkit_prompt_tokens", "Tokens of prompts.", labels, registry=self.registry)
        self._first = Histogram(
            "llmkit_time_to_first_token_seconds",
            "From the request to its first token.",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._ended = Histogram(
            "llmkit_generation_seconds", "Of whole generations.", labels, buckets=SECONDS, registry=self.registry
        )
        self.rate = Rate()
        self.registry.register(_Gauges(models, admission, self.rate))

    def request(self, path: str, status: int) -> None:
        """An HTTP request was answered; `path` is the route's, so that there are few."""
        self._requests.labels(path, str(status)).inc()

    def started(self, model: Model, prompt_tokens: int) -> None:
        self._prompt.labels(model.names[0]).inc(prompt_tokens)

    def first_token(self, model: Model, seconds: float) -> None:
        self._first.labels(model.names[0]).observe(seconds)

    def ended(self, model: Model, tokens: int, seconds: float) -> None:
        """A generation has left the engine, with so many tokens."""
        self._generated.labels(model.names[0]).inc(tokens)
        self._ended.labels(model.names[0]).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus's text form."""
        return generate_latest(self.registry)


class Rate:
    """Tokens a second of late."""

    def __init__(self) -> None:
        self._slots: deque[list[float]] = deque()  # [second, tokens]

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        if self._slots and now - self._slots[-1][0] < 1:
            self._slots[-1][1] += tokens
        else:
            self._slots.append([now, tokens])
            self._forget(now)

    def value(self) -> float:
        now = time.monotonic()
        self._forget(now)
        return sum(tokens for _, tokens in self._slots) / RATE_SECONDS

    def _forget(self, now: float) -> None:
        while self._slots and now - self._slots[0][0] > RATE_SECONDS:
            self._slots.popleft()


class _Gauges(Collector):
    """What is so at the moment."""

    def __init__(self, models: Models, admission: Admission, rate: Rate) -> None:
        self._models, self._admission, self._rate = models, admission, rate

    def collect(self) -> Iterator[Metric]:
        ready = float(self._models.status == "ready")
        yield GaugeMetricFamily("llmkit_ready", "1 when requests are taken.", value=ready)
        in_flight = float(self._admission.in_flight)
        yield GaugeMetricFamily("llmkit_generations", "Generations in the server, waiting and running.", in_flight)
        yield GaugeMetricFamily(
            "llmkit_generated_tokens_per_second", f"Of the last {RATE_SECONDS:.0f} s.", self._rate.value()
        )
        gauges = {
            name: GaugeMetricFamily(f"llmkit_{name}", text, labels=["model"])
            for name, text in (
                ("batch_size", "Generations that run."),
                ("queue_size", "Generations that wait for a place in the batch."),
                ("kv_cache_usage", "Share of the key-value cache that is in use, 0 to 1."),
            )
        }
        for model in self._models:
            for name, value in model.streams.load().items():
                gauges[name].add_metric([model.names[0]], value)
        yield from gauges.values()
