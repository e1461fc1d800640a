"""GPT-2, readable top to bottom. Dimensions: B batch, T positions, C channels, H heads, V vocabulary.

Module names are Hugging Face's, so that a state dict differs from their checkpoint only in that the four linear layers
of a block are stored as (out, in) here and as (in, out) there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkit.gpt2 import PARAMETERS, GPT2Config
from llmkit_torch.update import whole


class Attention(nn.Module):
    """Causal self-attention with all heads in one product."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.c_attn(x).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    """Two linear layers with GELU (tanh approximation, as GPT-2 was trained with) between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.wte(ids) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT2(nn.Module):
    """Language model with the head tied to the token embedding."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> mean loss in nats, a scalar in fp32."""
        hidden = self.transformer(ids)
        logits = F.linear(hidden, self.transformer.wte.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def initialise(self, seed: int) -> None:
        """llm.c's initialisation, drawn in module order from one generator.

        Normal with deviation 0.02; the projections that end in the residual stream 0.02 / sqrt(2L), since 2L of them
        add up there; biases 0, norms 1 and 0.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.depth)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual if name.endswith("c_proj") else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.inference_mode()
    def generate(self, prompt: list[int], tokens: int, *, temperature: float, seed: int, end: int | None) -> list[int]:
        """Sample a continuation, up to `tokens` ids or the `end` id. No KV cache: these are short looks at a model."""
        device = self.transformer.wte.weight.device
        generator = torch.Generator(device=device).manual_seed(seed)
        ids = list(prompt)
        while len(ids) < len(prompt) + tokens:
            window = torch.tensor([ids[-self.config.context :]], device=device)
            probabilities = torch.softmax(self(window)[0, -1].float() / temperature, dim=-1)
            chosen = int(torch.multinomial(probabilities, 1, generator=generator))
            if chosen == end:
                break
            ids.append(chosen)
        return ids[len(prompt) :]


TRANSPOSED = tuple(p.hf.split("{}")[1] for p in PARAMETERS if p.transposed)


def to_hf(model: GPT2) -> dict[str, npt.NDArray[np.float32]]:
    """The weights as fp32 arrays in Hugging Face's layout. Where FSDP shares them out, all processes must ask."""
    weights = {}
    for name, tensor in model.state_dict().items():
        array = whole(tensor).float().cpu().numpy()
        weights[name] = np.ascontiguousarray(array.T) if name.endswith(TRANSPOSED) else array
    return weights


def load_hf(model: GPT2, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Copy weights in Hugging Face's layout into the model."""
    state = {
        name: torch.from_numpy(np.ascontiguousarray(array.T) if name.endswith(TRANSPOSED) else np.array(array))
        for name, array in weights.items()
    }
    model.load_state_dict(state)
