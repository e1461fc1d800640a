"""Recipe: from a few options to a whole training configuration, and the learning rate at every step.

Rules follow published practice, so that `--depth` alone is a good run:
- width and heads: GPT-2's own at its depths, else 64 channels a layer and 64 a head (nanochat's one dial);
- tokens: 20 per parameter (Hoffmann et al. 2022), but at most 4 passes over the data (Muennighoff et al. 2023 found
  that more is worth little);
- learning rate 0.003239 - 0.0001395 ln N (Kaplan et al. 2020, equation D.1), N the parameters without embeddings;
- batch: 2^19 tokens at 124M as llm.c, scaled with N^(2/3), but small enough for about 1000 steps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.gpt2 import DEPTHS, GPT2Config, shape_of_size
from llmkit.options import check
from llmkit.trainer import TrainConfig

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData

C = TypeVar("C", bound=TrainConfig)

DEFAULT_DEPTH = 6
TOKENS_PER_PARAMETER = 20
EPOCHS = 4
MICRO_BATCH_TOKENS = 4096
GPT2_BATCH_TOKENS = 2**19
GPT2_PARAMETERS = 85e6  # of GPT-2 124M, without embeddings
USUAL_STEPS = 1000


def model_config(config: TrainConfig, vocab: int, context: int | None = None) -> GPT2Config:
    """GPT-2's shape for a resolved configuration; `context` positions, else one sequence."""
    assert config.depth and config.width and config.heads and config.sequence_length
    return GPT2Config(
        vocab=vocab,
        context=context or config.sequence_length,
        depth=config.depth,
        heads=config.heads,
        width=config.width,
    )


def resolve(config: C, data: TokenData, start: Checkpoint | None, *, processes: int = 1) -> C:
    """Fill in what was not given. Raises ValueError, naming the flag, for values that cannot work together.

    `processes` share out the micro-batches of every step evenly.
    """
    check(config)
    if start is not None:
        config = _take_shape(config, data, start)
    depth, width, heads = _shape(config)
    length = config.sequence_length or (256 if depth <= 4 else 512 if depth < 12 else 1024)
    if start is not None:
        context = GPT2Config.from_hf(start.config).context
        length = config.sequence_length or min(length, context)
        if length > context:
            raise ValueError(f"--sequence-length {length} is beyond the {context} positions of the checkpoint's model")
    config = dataclasses.replace(config, depth=depth, width=width, heads=heads, sequence_length=length)
    model = model_config(config, data.vocab_size)
    batch_size = config.batch_size or max(1, MICRO_BATCH_TOKENS // length)
    micro = batch_size * length * processes
    total = config.total_batch_tokens or _total_batch(model, data.splits["train"].tokens, micro, config.steps)
    if total % micro:
        below = total // micro * micro
        nearest = f"{below} or {below + micro}" if below else str(micro)
        raise ValueError(
            f"--total-batch-tokens {total} does not divide into micro-batches of {batch_size} sequences of {length} "
            f"tokens{f' in each of {processes} processes' if processes > 1 else ''} ({micro}): use {nearest}, or "
            "another --batch-size"
        )
    steps = config.steps or max(1, round(_token_budget(model, data.splits["train"].tokens) / total))
    warmup = min(700, steps // 20) if config.warmup_steps is None else config.warmup_steps
    if warmup > steps:
        raise ValueError(f"--warmup-steps {warmup} is more than the {steps} steps of the run")
    rate = 0.003239 - 0.0001395 * math.log(model.matrix_parameters)
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        total_batch_tokens=total,
        steps=steps,
        warmup_steps=warmup,
        learning_rate=float(f"{rate:.3g}") if config.learning_rate is None else config.learning_rate,
        val_every=min(250, max(1, steps // 10)) if config.val_every is None else config.val_every,
        sample_every=max(1, steps // 5) if config.sample_every is None else config.sample_every,
        checkpoint_every=min(1000, max(1, steps // 10)) if config.checkpoint_every is None else config.checkpoint_every,
    )


def _shape(config: TrainConfig) -> tuple[int, int, int]:
    """(depth, width, heads) from whichever of them, or `size`, is given."""
    depth, width, heads = config.depth, config.width, config.heads
    if config.size is not None:
        named = shape_of_size(config.size)
        for flag, given, value in zip(("--depth", "--width", "--heads"), (depth, width, heads), named):
            if given not in (None, value):
                raise ValueError(f"{flag} {given} contradicts --size {config.size}, which has {value}")
        return named
    depth = depth or DEFAULT_DEPTH
    if width is None:
        width, usual_heads = DEPTHS.get(depth, (64 * depth, depth))
        heads = heads or usual_heads
    heads = heads or max(1, width // 64)
    if width % heads:
        raise ValueError(f"--width {width} does not divide into --heads {heads}")
    return depth, width, heads


def _take_shape(config: C, data: TokenData, start: Checkpoint) -> C:
    """The shape of the checkpoint that training begins with; what was given must agree with it."""
    model = GPT2Config.from_hf(start.config)
    if (start.path / "tokenizer.json").is_file():
        if start.tokenizer.fingerprint != data.tokenizer_fingerprint:
            raise ValueError(
                f"the data in {data.path} were made with another tokenizer than the checkpoint's: prepare them with "
                f"--tokenizer {start.path}"
            )
    elif data.vocab_size > model.vocab:
        raise ValueError(f"the data's vocabulary of {data.vocab_size} is beyond the checkpoint's {model.vocab}")
    shape: dict[str, Any] = {"depth": model.depth, "width": model.width, "heads": model.heads}
    if config.size is not None and shape_of_size(config.size) != tuple(shape.values()):
        raise ValueError(f"--size {config.size} contradicts the checkpoint of --from")
    for name, value in shape.items():
        if getattr(config, name) not in (None, value):
            raise ValueError(
                f"--{name} {getattr(config, name)} contradicts the checkpoint of --from, which has {value}"
            )
    return dataclasses.replace(config, size=None, **shape)


def _token_budget(model: GPT2Config, train_tokens: int) -> int:
    return min(TOKENS_PER_PARAMETER * model.parameters, EPOCHS * train_tokens)


def _total_batch(model: GPT2Config, train_tokens: int, micro: int, steps: int | None) -> int:
    """A power of two of micro-batches near llm.c's batch, scaled to the model and the run."""
    wanted = GPT2_BATCH_TOKENS * (model.matrix_parameters / GPT2_PARAMETERS) ** (2 / 3)
    wanted = min(wanted, _token_budget(model, train_tokens) / (steps or USUAL_STEPS))
    return int(micro * 2 ** max(0, math.floor(math.log2(max(wanted / micro, 1)))))


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step number `step`, counted from 0, as llm.c computes it.

    Linear warm-up to the peak; then cosine or linear decay to the final fraction over the rest, or constant, or "wsd":
    constant, and 1 - sqrt(x) over the last 20%.
    """
    assert config.steps is not None and config.warmup_steps is not None and config.learning_rate is not None
    peak, last = config.learning_rate, config.learning_rate * config.final_lr_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return last + 0.5 * (1 + math.cos(math.pi * done)) * (peak - last)
    if config.schedule == "linear":
        return peak - done * (peak - last)
    if config.schedule == "wsd":
        begin = int(0.8 * config.steps)
        if step < begin:
            return peak
        return last + (1 - math.sqrt((step - begin) / (config.steps - begin))) * (peak - last)
    return peak
