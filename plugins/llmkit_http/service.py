"""Service: what the endpoints share - the models, limits and metrics of one server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastapi import Request

from llmkit import __version__
from llmkit_http.errors import bad_request
from llmkit_http.jobs import Job
from llmkit_http.limits import Admission
from llmkit_http.metrics import Metrics

if TYPE_CHECKING:
    from llmkit.engine import Constraint, Sampling
    from llmkit_http.models import Model, Models
    from llmkit_http.options import HttpOptions

FINGERPRINT = f"llmkit-{__version__}"


class Service:
    """One server's state, found by the endpoints through the request."""

    def __init__(self, models: Models, options: HttpOptions) -> None:
        self.models, self.options = models, options
        self.admission = Admission(options.max_queue)
        self.metrics = Metrics(models, self.admission)

    def check_n(self, n: int | None) -> int:
        """How many answers are asked for. Raises APIError beyond the limit."""
        if (n or 1) > self.options.max_n:
            raise bad_request(f"n: at most {self.options.max_n} answers are given to one prompt, not {n}", "n")
        return n or 1

    def check_max_tokens(self, wanted: int, param: str) -> None:
        """Raises APIError beyond the server's limit."""
        limit = self.options.max_tokens
        if limit is not None and wanted > limit:
            raise bad_request(f"{param}: at most {limit} tokens are generated here, not {wanted}", param)

    def job(
        self,
        model: Model,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        n: int = 1,
        constraint: Callable[[], Constraint] | None = None,
    ) -> Job:
        """Start the generations. Raises APIError."""
        return Job(
            model,
            prompts,
            sampling,
            stop=stop,
            n=n,
            constraint=constraint,
            admission=self.admission,
            metrics=self.metrics,
        )


def service(request: Request) -> Service:
    """The service of the server that got the request."""
    found: Service = request.app.state.service
    return found
