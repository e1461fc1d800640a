"""Flags that commands which generate text share: how tokens are sampled, and how the model is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from llmkit.engine import Sampling

F = TypeVar("F", bound=Callable[..., Any])

TEMPERATURE = 0.8  # plain sampling from a small model wanders; this stays lively


def sampling_flags(function: F) -> F:
    """--greedy, --temperature, --top-k, --top-p, --seed: what `read_sampling` takes."""
    for option in reversed(_SAMPLING):
        function = option(function)
    return function


def engine_flags(function: F) -> F:
    """--engine, --dtype, --quantize, --device: what `llmkit.engines.open_engine` takes."""
    for option in reversed(_ENGINE):
        function = option(function)
    return function


def endpoint_flags(function: F) -> F:
    """--engine-url, --engine-model: what `llmkit.engines.open_engine` takes for a remote engine."""
    for option in reversed(_ENDPOINT):
        function = option(function)
    return function


def read_sampling(
    *,
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    max_tokens: int,
) -> Sampling:
    """The sampling that the flags ask for. Raises click.UsageError where --greedy stands beside one that samples."""
    from llmkit.engine import Sampling

    sampled = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    if greedy and (given := [flag for flag, value in sampled.items() if value is not None]):
        raise click.UsageError(f"--greedy does not sample, so it cannot be combined with {given[0]}")
    return Sampling(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else TEMPERATURE if temperature is None else temperature,
        top_k=top_k or 0,
        top_p=top_p or 1.0,
        seed=seed,
    )


_SAMPLING = (
    click.option("--greedy", is_flag=True, help="Take the likeliest token each time."),
    click.option("--temperature", type=click.FloatRange(min=0), metavar="X", help=f"[default: {TEMPERATURE}]"),
    click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Sample from the N likeliest tokens."),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="X",
        help="Sample from the likeliest tokens that hold X of the probability.",
    ),
    click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Makes sampling repeatable."),
)

_ENGINE = (
    click.option("--engine", metavar="NAME", help="[default: the one for the model's architecture]"),
    click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="[default: the checkpoint's]"),
    click.option(
        "--quantize", type=click.Choice(["int8"]), help="Round the weights to this type when they are loaded."
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps  [default: the best there is]"),
)

_ENDPOINT = (
    click.option("--engine-url", metavar="URL", help="Endpoint of engine openai.  [default: $OPENAI_BASE_URL]"),
    click.option("--engine-model", metavar="NAME", help="Model of the endpoint.  [default: the only one]"),
)
