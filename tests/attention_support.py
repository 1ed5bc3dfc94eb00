"""Operands of attention, and attention by its definition."""

import torch
from support import F64, INF, NAN


def operands(shape, dtype, device):
    batch, heads, kv_heads, queries, keys, head_size, value_head_size = shape
    query = torch.randn(batch, heads, queries, head_size, dtype=F64).to(dtype)
    key = torch.randn(batch, kv_heads, keys, head_size, dtype=F64).to(dtype)
    value = torch.randn(batch, kv_heads, keys, value_head_size, dtype=F64).clamp(-2, 2).to(dtype)
    return query.to(device), key.to(device), value.to(device)


def reference(query, key, value, mask=None, is_causal=False, scale=None):
    """The definition, in float64 on the CPU."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.cpu().to(F64) for x in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        square = torch.ones(scores.shape[2:], dtype=torch.bool)
        scores = scores.masked_fill(~square.tril(scores.shape[3] - scores.shape[2]), -INF)
    if mask is not None:
        mask = mask.cpu()
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    output = (scores.softmax(-1) @ value).masked_fill(lse[..., None] == -INF, 0.0)
    return output, lse.masked_fill(lse == INF, NAN)
