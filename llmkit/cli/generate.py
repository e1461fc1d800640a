"""`llmkit generate`: continues a prompt and streams the text to the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from llmkit.cli import ui
from llmkit.cli.sampling import endpoint_flags, engine_flags, read_sampling, sampling_flags

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.generation import TextGenerator, TextRequest


@click.command("generate")
@click.argument("checkpoint", required=False)
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue; `-` reads standard input.")
@click.option("--chat", is_flag=True, help="Give the prompt as a user's message, by the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message in front, with --chat.")
@sampling_flags
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Generate at most N tokens.",
)
@click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Continue the prompt N times, with the seeds --seed, --seed + 1, …",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@engine_flags
@endpoint_flags
@ui.json_option
def command(
    checkpoint: str | None,
    prompt: str,
    chat: bool,
    system: str | None,
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    max_tokens: int,
    num_samples: int,
    stop: tuple[str, ...],
    engine: str | None,
    dtype: str | None,
    quantize: str | None,
    device: str | None,
    engine_url: str | None,
    engine_model: str | None,
    as_json: bool,
) -> None:
    """Continue a prompt with CHECKPOINT, by default the newest of the latest training run."""
    sampling = read_sampling(
        greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens
    )
    if greedy and num_samples > 1:
        raise click.UsageError("--greedy gives the same text each time, so it cannot be combined with --num-samples")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    if "" in stop:
        raise click.UsageError("--stop needs a text that is not empty")

    from llmkit.checkpoint import Checkpoint
    from llmkit.engines import open_engine
    from llmkit.generation import TextGenerator, TextRequest

    text = _read_prompt(prompt)
    opened = Checkpoint.open(checkpoint)
    ids = _encode(opened, text, chat=chat, system=system)
    request = TextRequest(0, tuple(ids), sampling, stop=stop, n=num_samples)
    with open_engine(
        opened, engine, dtype=dtype, device=device, quantize=quantize, url=engine_url, model=engine_model
    ) as running:
        if len(ids) >= running.context_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the model's context of {running.context_length} leaves room "
                f"for {running.context_length - 1}"
            )
        started = time.perf_counter()
        samples = _generate(TextGenerator(running, opened.tokenizer), request, show=not as_json)
        seconds = time.perf_counter() - started
    rate = sum(sample["tokens"] for sample in samples) / seconds
    if as_json:
        result = {"checkpoint": str(opened.path), "prompt": text, "samples": samples}
        ui.emit({**result, "tokens_per_second": round(rate, 2)})
        return
    for sample in samples:
        seed_note = "" if sampling.temperature == 0 else f", seed {sample['seed']}"
        ui.note(f"[{sample['tokens']} tokens, ended by {sample['finish_reason']}{seed_note}]")
    ui.note(f"[{rate:.1f} tokens/s]")


def _read_prompt(prompt: str) -> str:
    """The prompt, or standard input for `-`. Raises ValueError unless it is UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if prompt == "-" else prompt
        text.encode("utf-8")  # arguments that are not UTF-8 arrive with lone surrogates
    except UnicodeError:
        raise ValueError("the prompt is not UTF-8 text") from None
    return text


def _encode(checkpoint: Checkpoint, text: str, *, chat: bool, system: str | None) -> list[int]:
    """Token ids of the prompt, at least one. Raises ValueError where there is nothing to begin with."""
    from llmkit.chat import encode_chat

    if chat:
        messages = [] if system is None else [{"role": "system", "content": system}]
        return encode_chat(checkpoint, [*messages, {"role": "user", "content": text}])
    if ids := checkpoint.tokenizer.encode_prompt(text):
        return ids
    if checkpoint.tokenizer.eot_id is None:
        raise ValueError("the prompt is empty, and the model's tokenizer has no token to begin a text with")
    return [checkpoint.tokenizer.eot_id]


def _generate(generator: TextGenerator, request: TextRequest, *, show: bool) -> list[dict[str, Any]]:
    """The samples as the JSON result has them. With `show`, the first is streamed to stdout, the others follow it."""
    samples: list[dict[str, Any]] = [{"text": ""} for _ in range(request.n)]
    done: list[str | None] = [None] * request.n
    live = 0  # the sample that is being shown
    if show and request.n > 1:
        _show("--- sample 1\n")
    for piece in generator.stream([request]):
        sample = samples[piece.sample]
        sample["text"] += piece.text
        sample.update(tokens=piece.tokens, finish_reason=piece.finish_reason, seed=piece.seed)
        done[piece.sample] = piece.finish_reason
        if not show:
            continue
        if piece.sample == live:
            _show(piece.text)
        while live < request.n and done[live]:
            if not samples[live]["text"].endswith("\n"):
                _show("\n")
            live += 1
            if live < request.n:
                _show(f"--- sample {live + 1}\n{samples[live]['text']}")
    return samples


def _show(text: str) -> None:
    """Text on stdout as it comes; on a terminal without control characters."""
    sys.stdout.write(ui.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
