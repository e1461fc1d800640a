"""Trainer `example`: a bigram model in numpy, saved as a GPT-2 that computes it. A loop to begin with.

The next token depends on the last one only: logits = wte[token] @ wte.T, trained by plain gradient descent with momentum.
The checkpoint is a GPT-2 whose blocks add nothing, so that every engine runs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit import hookimpl
from llmkit.trainer import Event, Finished, Saved, Started, Step, Trainer, TrainJob, Validation, due

if TYPE_CHECKING:
    import numpy as np


class Example(Trainer):
    """A bigram model in numpy."""

    name = "example"

    def train(self, job: TrainJob) -> Iterator[Event]:
        import numpy as np

        from llmkit.gpt2 import hf_weights
        from llmkit.recipe import learning_rate_at, model_config

        c, step, val_loss = job.config, 0, None
        batches = job.batches()
        if job.start is not None:
            shape, weights = hf_weights(job.start)
        else:
            shape = model_config(c, job.data.vocab_size)
            weights = blank_gpt2(shape, np.random.default_rng(c.seed))
        embedding = weights["transformer.wte.weight"].copy()  # (V, C)
        momentum = np.zeros_like(embedding)
        if job.resume and job.start is not None:
            state = np.load(job.start.trainer_state / "state.npz", allow_pickle=False)
            step, batches.position, momentum = int(state["step"]), int(state["position"]), state["momentum"]
        first = step
        yield Started(step, shape.parameters, 6 * embedding.size, None, "cpu (numpy)")

        def save() -> Saved:
            def write_state(folder: Path) -> None:
                np.savez(folder / "state.npz", step=step, position=batches.position, momentum=momentum)

            config = shape.to_hf(eot_id=job.data.eot_id)
            tensors = {**weights, "transformer.wte.weight": embedding}
            return job.save(step, config=config, weights=tensors, write_state=write_state, val_loss=val_loss)

        while True:
            if due(step, c.val_every, c.steps) and (step > first or not job.resume):
                losses = [loss_and_gradient(embedding, x, y)[0] for x, y in job.validation]
                val_loss = sum(losses) / len(losses)
                yield Validation(step, val_loss)
            saved = step > first and due(step, c.checkpoint_every, c.steps)
            if saved:
                yield save()
            if step == c.steps:
                break
            if job.stop.is_set():
                if step > first and not saved:
                    yield save()
                yield Finished(step, interrupted=True)
                return
            began = time.perf_counter()
            accumulated = c.total_batch_tokens // (c.batch_size * c.sequence_length)
            total, gradient = 0.0, np.zeros_like(embedding)
            for _ in range(accumulated):
                loss, part = loss_and_gradient(embedding, *next(batches))
                total += loss / accumulated
                gradient += part / accumulated
            norm = float(np.sqrt((gradient**2).sum()))
            scale = min(1.0, c.grad_clip / norm) if c.grad_clip and norm else 1.0
            rate = learning_rate_at(step, c) * 300  # the shared rates are Adam's; plain descent takes longer strides
            momentum = 0.9 * momentum + scale * gradient
            embedding = (embedding - rate * momentum).astype(np.float32)
            step += 1
            yield Step(step - 1, total, rate, norm, c.total_batch_tokens, time.perf_counter() - began)
        yield Finished(step)


def blank_gpt2(shape, rng) -> dict[str, np.ndarray]:
    """A GPT-2 whose blocks add nothing and whose last norm changes little: random embedding, zeros, ones."""
    import numpy as np

    from llmkit.gpt2 import hf_shapes

    weights = {name: np.zeros(size, dtype=np.float32) for name, size in hf_shapes(shape).items()}
    for name in weights:
        if "ln_" in name and name.endswith("weight"):
            weights[name] += 1
    wte = weights["transformer.wte.weight"]
    wte += rng.normal(0, 0.02, wte.shape)
    return weights


def loss_and_gradient(embedding: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss in nats of x -> y, both (B, T), and its gradient (V, C), through the last norm of GPT-2."""
    import numpy as np

    x, y = x.ravel(), y.ravel()
    h = embedding[x]  # (N, C)
    centred = h - h.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = centred / deviation
    logits = normed @ embedding.T
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    rows = np.arange(len(x))
    loss = float(-np.log(p[rows, y]).mean())
    p[rows, y] -= 1
    p /= len(x)
    gradient = p.T @ normed  # of the head
    back = p @ embedding
    back = (back - back.mean(-1, keepdims=True) - normed * (back * normed).mean(-1, keepdims=True)) / deviation
    np.add.at(gradient, x, back)  # of the embedding: the two are tied
    return loss, gradient


@hookimpl
def llmkit_register_trainers() -> list[type[Trainer]]:
    return [Example]
