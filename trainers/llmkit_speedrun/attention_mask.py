"""Which tokens attend to which in training: earlier ones of the same document, at most a window back.

On CUDA as a BlockMask for FlexAttention, which skips what is masked; elsewhere as a dense boolean mask for SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def document_ids(ids: Tensor, eot_id: int | None) -> Tensor:
    """The number of the document that each token of ids (B, T) belongs to, counted in its row.

    A document begins with its end-of-text token, as `llmkit data prepare` and llm.c write it.
    """
    if eot_id is None:
        return torch.zeros_like(ids)
    return (ids == eot_id).cumsum(-1)


def dense_mask(documents: Tensor, window: int) -> Tensor | None:
    """(B, 1, T, T), True where query t attends to key s; None where that is plain causal attention."""
    length = documents.shape[1]
    if window >= length and bool((documents[:, 0] == documents[:, -1]).all()):
        return None
    at = torch.arange(length, device=documents.device)
    distance = at[:, None] - at[None, :]
    band = (distance >= 0) & (distance < window)
    return (band & (documents[:, :, None] == documents[:, None, :]))[:, None]


def block_mask(documents: Tensor, window: int) -> Any:
    """The same as a BlockMask of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        return (distance >= 0) & (distance < window) & (documents[b, query] == documents[b, key])

    rows, length = documents.shape
    compiled = documents.device.type == "cuda"  # else it makes the dense mask first, which is 4 GiB for 64K tokens
    return create_block_mask(allowed, rows, None, length, length, device=str(documents.device), _compile=compiled)
