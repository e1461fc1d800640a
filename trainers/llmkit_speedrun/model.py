"""The 5-minute architecture of the NanoGPT speedrun (2024-11-19), readable top to bottom, as a Hugging Face model.

There is one copy of it: the trainer trains this class, and transformers, vLLM (through its Transformers backend) and
lm-eval run it. Importing this file registers it with transformers' Auto classes; no remote code is involved.

What sets it apart from GPT-2, by whose idea it came into the speedrun:
- rotary positions (Su et al. 2021), RMS norms without parameters, no biases;
- queries and keys are normed (QK-norm, Dehghani et al. 2023), ReLU^2 (So et al. 2021), output projections and the head
  start at zero (muP's advice, Yang et al. 2022), the head is not tied to the embedding: @Grad62304977, Keller Jordan;
- value residual: every layer mixes its values with those of layer 0 (Zhou et al. 2024); embedding shortcut: every block
  mixes the normed embedding into its input; tanh softcap on the logits (Gemma Team 2024): @Grad62304977, @KoszarskyB;
- U-net skips: the second half of the layers adds what the first half produced, in reverse order: @brendanh0gan;
- attention within a document and a sliding window: @KoszarskyB.
Each can be switched off in the configuration, for ablations. Dimensions: B batch, T positions, C channels, H heads, D
channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

GATE_CHANNELS = 32  # of a block's input that the gate of a value embedding looks at


class SpeedrunConfig(PreTrainedConfig):
    """config.json of a model. `sliding_window`: how many tokens back attention reaches, itself included; None: all."""

    model_type = "llmkit_speedrun"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 65536,
        sliding_window: int | None = None,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        final_logit_softcapping: float | None = 30.0,
        rotary: bool = True,
        qk_norm: bool = True,
        relu2: bool = True,
        zero_init: bool = True,
        value_residual: bool = True,
        embedding_shortcut: bool = True,
        unet_skips: bool = True,
        value_embeddings: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = self.num_key_value_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.sliding_window = sliding_window
        # transformers' caches and vLLM read the window of each layer from here
        self.layer_types = [self.layer_type] * num_hidden_layers
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.final_logit_softcapping = final_logit_softcapping
        self.rotary = rotary
        self.qk_norm = qk_norm
        self.relu2 = relu2
        self.zero_init = zero_init
        self.value_residual = value_residual
        self.embedding_shortcut = embedding_shortcut
        self.unet_skips = unet_skips
        self.value_embeddings = value_embeddings
        for computed in ("num_key_value_heads", "head_dim", "layer_types"):
            kwargs.pop(computed, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def layer_type(self) -> str:
        """transformers' name for what every layer attends to."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"


class ZeroLinear(nn.Linear):
    """A linear layer that begins with zeros."""


class ZeroEmbedding(nn.Embedding):
    """An embedding that begins with zeros."""


def norm(x: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotary_tables(config: SpeedrunConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (B, T): both (B, 1, T, D/2)."""
    steps = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * config.rope_theta ** (-steps / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of x (B, H, T, D) together with channel i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """What transformers calls "eager": softmax(q k^T / sqrt(D) + mask) v, written out. The mask is added."""
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SpeedrunAttention(nn.Module):
    """Causal self-attention with normed queries and keys; values are mixed with those of layer 0."""

    def __init__(self, config: SpeedrunConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.scaling = config.head_dim**-0.5
        self.sliding_window = config.sliding_window
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = (ZeroLinear if config.zero_init else nn.Linear)(width, width, bias=False)
        if config.value_residual:
            self.value_lambda = nn.Parameter(torch.tensor([0.5]))
        # In every other layer, so that the last one has them.
        self.has_value_embedding = config.value_embeddings and (config.num_hidden_layers - 1 - layer_idx) % 2 == 0
        if self.has_value_embedding:
            self.value_embedding = ZeroEmbedding(config.vocab_size, width)
            self.value_gate = ZeroLinear(min(GATE_CHANNELS, width), config.num_attention_heads, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Any,
        first_values: Tensor | None,  # (B, H, T, D), None in layer 0
        input_ids: Tensor | None,  # for value embeddings only
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(output (B, T, C), values of layer 0)."""
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if self.has_value_embedding:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, H), 1 at first
            v = v + gate.transpose(1, 2).unsqueeze(-1) * self.value_embedding(input_ids).view(heads).transpose(1, 2)
        if first_values is None:
            first_values = v
        if self.config.value_residual:
            v = torch.lerp(v, first_values, self.value_lambda.to(v.dtype))
        if self.config.qk_norm:
            q, k = norm(q, self.config.rms_norm_eps), norm(k, self.config.rms_norm_eps)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms and rotation may have widened them
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # One call through a local name, with these arguments: vLLM puts its own attention here.
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, plain_attention
        )
        y, _ = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(y.reshape(x.shape)), first_values


class SpeedrunMLP(nn.Module):
    """Two linear layers with ReLU^2 between them."""

    def __init__(self, config: SpeedrunConfig) -> None:
        super().__init__()
        self.relu2 = config.relu2
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        projection = ZeroLinear if config.zero_init else nn.Linear
        self.down_proj = projection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        return self.down_proj(F.relu(x).square() if self.relu2 else F.gelu(x, approximate="tanh"))


class SpeedrunBlock(nn.Module):
    """Mix in the embedding, then x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: SpeedrunConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = SpeedrunAttention(config, layer_idx)
        self.mlp = SpeedrunMLP(config)
        self.embedding_shortcut = config.embedding_shortcut
        if config.embedding_shortcut:
            self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, embedded: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.embedding_shortcut:
            x = self.lambdas[0] * x + self.lambdas[1] * embedded
        attended, first_values = self.self_attn(norm(x, self.eps), **kwargs)
        x = x + attended
        return x + self.mlp(norm(x, self.eps)), first_values


class SpeedrunPreTrainedModel(PreTrainedModel):
    """What transformers wants to know, and how weights begin."""

    config_class = SpeedrunConfig
    base_model_prefix = "model"
    _no_split_modules = ("SpeedrunBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Uniform with deviation 1/sqrt(3 inputs) for matrices, PyTorch's default; normal for the embedding."""
        if isinstance(module, (ZeroLinear, ZeroEmbedding)):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, nn.Embedding):  # as large as a norm makes it; small where it is the head too
            nn.init.normal_(module.weight, std=0.02 if self.config.tie_word_embeddings else 1.0)


class SpeedrunModel(SpeedrunPreTrainedModel):
    """Embedding, blocks and the last norm: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: SpeedrunConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SpeedrunBlock(config, i) for i in range(config.num_hidden_layers))
        if config.unet_skips:
            self.skip_weights = nn.Parameter(torch.ones(config.num_hidden_layers // 2))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask`: padding (B, T); or all of it, boolean (B, 1, T, T) or a BlockMask, used as it is."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.value_embeddings and input_ids is None:
            raise ValueError("a model with value embeddings needs input_ids, not inputs_embeds")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        embedded = norm(inputs_embeds, self.config.rms_norm_eps)  # (B, T, C)
        rotary = rotary_tables(self.config, position_ids, embedded.dtype) if self.config.rotary else None
        x, first_values = embedded, None
        skips: list[Tensor] = []
        half = self.config.num_hidden_layers // 2
        for i, layer in enumerate(self.layers):
            # The first half leaves its outputs, the second half takes them last in, first out.
            if self.config.unet_skips and i >= self.config.num_hidden_layers - half:
                x = x + self.skip_weights[i - self.config.num_hidden_layers + half] * skips.pop()
            x, first_values = layer(
                x,
                embedded,
                rotary=rotary,
                attention_mask=mask,
                first_values=first_values,
                input_ids=input_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            if i < half:
                skips.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=norm(x, self.config.rms_norm_eps),
            past_key_values=past_key_values if use_cache else None,
        )


class SpeedrunForCausalLM(SpeedrunPreTrainedModel, GenerationMixin):
    """Language model: ids (B, T) -> logits (B, T, V)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  where the configuration ties them

    def __init__(self, config: SpeedrunConfig) -> None:
        super().__init__(config)
        self.model = SpeedrunModel(config)
        self.lm_head = (ZeroLinear if config.zero_init else nn.Linear)(
            config.hidden_size, config.vocab_size, bias=False
        )
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V) in fp32, squeezed into (-cap, cap)."""
        cap = self.config.final_logit_softcapping
        if cap is None:
            return self.lm_head(hidden).float()
        return cap * torch.tanh(self.lm_head(hidden / cap).float())  # divided where it is small, not (B, T, V)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' own models: `labels` are ids like `input_ids`, shifted here; -100 is ignored."""
        use_cache = not self.training if use_cache is None else use_cache
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register(SpeedrunConfig.model_type, SpeedrunConfig, exist_ok=True)
AutoModel.register(SpeedrunConfig, SpeedrunModel, exist_ok=True)
AutoModelForCausalLM.register(SpeedrunConfig, SpeedrunForCausalLM, exist_ok=True)
