"""Grouped-query attention for a decode step, without repeating the cached keys and values.

With a mask, transformers repeats every key and value head for each query head of its group. That copies the whole
context in each layer of each step. In a decode step each query head has one token, so the heads of a group can take the
place of query tokens. The product is the same, and nothing is copied.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "millrace_slots"


def register() -> str:
    """Register this attention with transformers. Return its name there."""
    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention. Anything but a plain decode step is passed to transformers' own function.

    query: [rows, heads, tokens, dim]. key, value: [rows, groups, context, dim]. attention_mask: [rows, 1, tokens,
    context]. Returns [rows, tokens, heads, dim].
    """
    rows, heads, tokens, dim = query.shape
    groups = key.shape[1]
    if tokens != 1 or heads == groups or attention_mask is None or kwargs.get("position_bias") is not None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended, None
    grouped = query.view(rows, groups, heads // groups, dim)
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, value.shape[3]), None
