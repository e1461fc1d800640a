"""Engine `example`: GPT-2 in numpy, one request at a time and no KV cache. Slow, and short enough to begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Self

from llmkit import hookimpl
from llmkit.checkpoint import Checkpoint
from llmkit.engine import Chunk, Engine, GenerateRequest, Sampling, ScoreRequest, ScoreResult

if TYPE_CHECKING:
    import numpy as np


class Example(Engine):
    """GPT-2 in numpy, without a KV cache."""

    name = "example"

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, dtype: str | None = None, device: str | None = None) -> Self:
        from llmkit.gpt2 import hf_weights

        engine = cls()
        engine.config, engine.weights = hf_weights(checkpoint)
        engine.vocab_size, engine.context_length = engine.config.vocab, engine.config.context
        engine.eos_ids = checkpoint.eos_ids
        engine.cancelled = set()
        return engine

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for request in requests:
            self.check(request)
            ids = request.context + request.continuation
            logprobs = self.logprobs(ids[:-1])[len(request.context) - 1 :]
            best = logprobs.argmax(axis=-1)
            yield ScoreResult(
                request.id,
                tuple(float(row[token]) for row, token in zip(logprobs, request.continuation)),
                tuple(bool(top == token) for top, token in zip(best, request.continuation)),
            )

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        import numpy as np

        for request in requests:
            self.check(request)
            sampling, ids = request.sampling, list(request.prompt)
            rng = np.random.default_rng(sampling.seed)
            stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self.eos_ids)
            reason = "length"
            while len(ids) - len(request.prompt) < sampling.max_tokens and len(ids) < self.context_length:
                if request.id in self.cancelled:
                    reason = "cancelled"
                    break
                logprobs = self.logprobs(tuple(ids))[-1]
                early = len(ids) - len(request.prompt) < sampling.min_tokens
                token = choose(logprobs, sampling, stops if early else set(), rng)
                if token in stops:
                    reason = "stop"
                    break
                ids.append(token)
                yield Chunk(request.id, (token,), () if sampling.logprobs is None else (float(logprobs[token]),))
            yield Chunk(request.id, (), finish_reason=reason)
        self.cancelled.clear()

    def cancel(self, request_id: int) -> None:
        self.cancelled.add(request_id)

    def logprobs(self, ids: tuple[int, ...]) -> np.ndarray:
        """ln p of every next token, (T, V)."""
        import numpy as np

        def norm(x: np.ndarray, name: str) -> np.ndarray:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

        def linear(x: np.ndarray, name: str) -> np.ndarray:
            return x @ self.weights[name + ".weight"] + self.weights[name + ".bias"]

        t, heads = len(ids), self.config.heads
        x = self.weights["transformer.wte.weight"][list(ids)] + self.weights["transformer.wpe.weight"][:t]  # (T, C)
        mask = np.triu(np.full((t, t), -np.inf), 1)
        for layer in range(self.config.depth):
            block = f"transformer.h.{layer}."
            qkv = linear(norm(x, block + "ln_1"), block + "attn.c_attn")
            q, k, v = qkv.reshape(t, 3, heads, -1).transpose(1, 2, 0, 3)  # each (H, T, C/H)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (weights / weights.sum(-1, keepdims=True)) @ v
            x = x + linear(mixed.transpose(1, 0, 2).reshape(t, -1), block + "attn.c_proj")
            h = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + linear(h, block + "mlp.c_proj")
        logits = norm(x, "transformer.ln_f") @ self.weights["transformer.wte.weight"].T
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def choose(logits: np.ndarray, sampling: Sampling, banned: set[int], rng: np.random.Generator) -> int:
    """The next token. Understands temperature, top_k, top_p and logit_bias; a real engine, all of Sampling."""
    import numpy as np

    logits = logits.copy()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    logits[list(banned)] = -np.inf
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits /= sampling.temperature
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits[order] - logits[order[0]])
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    probabilities /= probabilities.sum()
    probabilities[np.cumsum(probabilities) - probabilities >= sampling.top_p] = 0
    return int(rng.choice(order, p=probabilities / probabilities.sum()))


@hookimpl
def llmkit_register_engines() -> list[type[Engine]]:
    return [Example]
