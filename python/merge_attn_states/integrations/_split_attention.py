"""Attention with its keys in parts, merged one after the other: what an integration registers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import merge_attn_states
from .pytorch import attention_with_lse, token_layout

AttentionWithLse = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    parts: int = 2,
    attend: AttentionWithLse = attention_with_lse,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys in parts, each with its LSE, merged one after the other.

    Parameters
    ----------
    query, key, value, attn_mask, scale
        As in `attention_with_lse`.
    is_causal : bool, optional
        As many queries as keys; a query sees no key after its own. Not beside a mask.
    parts : int, optional
        Into how many parts of nearly equal length the keys are split. More parts than keys leave
        some without a key, which is legal.
    attend : callable, optional
        Computes one part, with the arguments and results of `attention_with_lse`. What it returns
        is only read, so that it may be remembered.

    Returns
    -------
    output : torch.Tensor
        [batch * num_queries, num_heads, value_head_size], contiguous, in `query`'s dtype; memory
        of its own.
    lse : torch.Tensor
        [num_heads, batch * num_queries], natural log; memory of its own.
    """
    check_parts(parts)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal and (attn_mask is not None or num_queries != num_keys):
        raise ValueError(
            "is_causal: expected as many queries as keys and no attn_mask, got "
            f"{num_queries} queries, {num_keys} keys"
        )
    # Cut to a part, a mask of other keys would fit.
    if attn_mask is not None and attn_mask.dim() and attn_mask.shape[-1] not in (1, num_keys):
        raise ValueError(
            f"attn_mask: expected a last size of 1 or {num_keys} = num_keys, "
            f"got {list(attn_mask.shape)}"
        )
    # A chain of merges rounds its output once a step: 16-bit outputs run in float32 and are
    # rounded at the end. A single merge rounds once anyway.
    running = query.dtype if parts <= 2 else torch.promote_types(query.dtype, torch.float32)
    output: torch.Tensor | None = None
    for part in range(parts):
        begin, end = num_keys * part // parts, num_keys * (part + 1) // parts
        keys, values = key[:, :, begin:end], value[:, :, begin:end]
        if is_causal:
            state = _causal_part(query, keys, values, begin, scale, attend)
        else:
            mask = attn_mask
            if mask is not None and mask.dim() and mask.shape[-1] > 1:
                mask = mask[..., begin:end]
            state = attend(query, keys, values, mask, scale=scale)
        part_output, part_lse = token_layout(*state)
        if output is None:
            # A copy, whatever it was: the merges write to it, and it may be `attend`'s own.
            output = part_output.to(running, copy=True, memory_format=torch.contiguous_format)
            lse = part_lse.clone()
        else:
            part_output = part_output.to(running)
            merge_attn_states(output, output, lse, part_output, part_lse, output_lse=lse)
    assert output is not None  # parts is at least 1
    return output.to(query.dtype), lse


def _causal_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begin: int,
    scale: float | None,
    attend: AttentionWithLse,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys begin .. end of a causal square: no row before, the causal half beside, all after.

    No mask is built, so that the flash kernels serve (on CUDA they take none).
    """
    batch, num_heads, num_queries, _ = query.shape
    end = begin + key.shape[2]
    output = query.new_empty(batch, num_queries, num_heads, value.shape[3]).transpose(1, 2)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch, num_queries, num_heads), -torch.inf, dtype=lse_dtype)
    lse = lse.transpose(1, 2)
    for rows, causal in ((slice(begin, end), True), (slice(end, num_queries), False)):
        state = attend(query[:, :, rows], key, value, None, is_causal=causal, scale=scale)
        output[:, :, rows], lse[:, :, rows] = state
    return output, lse


def check_parts(parts: int) -> None:
    """Refuse what is no number of parts."""
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts: expected an int of at least 1, got {parts!r}")
