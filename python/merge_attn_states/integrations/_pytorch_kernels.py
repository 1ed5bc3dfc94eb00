"""The kernels behind `pytorch.attention_with_lse`, each with what it needs to be right.

Arguments are validated, there is at least one query and one key, and a mask has four dimensions.
Shapes are those of `attention_with_lse`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's documentation gives it)

_CUDA_HEAD_SIZE_MULTIPLE = 8
_CUDA_ALIGNMENT = 16
# Scores that the matmul path holds at once (256 MiB in float32): queries are taken in blocks, so
# that a long sequence does not need [queries, keys] of memory.
_SCORES_AT_ONCE = 1 << 26


def unseen(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of queries that see no key."""
    batch, num_heads, num_queries, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(batch, num_queries, num_heads, value.shape[3])
    lse = query.new_full((batch, num_queries, num_heads), -torch.inf, dtype=lse_dtype)
    return output.transpose(1, 2), lse.transpose(1, 2)


def four_dimensions(attn_mask: torch.Tensor) -> torch.Tensor:
    """[batch, num_heads, num_queries, num_keys], expanded dimensions back at size 1."""
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]


def with_causal(mask: torch.Tensor | None, query: torch.Tensor, num_keys: int) -> torch.Tensor:
    """The mask without the keys after the query's own, aligned bottom-right."""
    num_queries = query.shape[2]
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    causal = causal.tril(num_keys - num_queries)[None, None]
    if mask is None or mask.dtype == torch.bool:
        return causal if mask is None else mask & causal
    return torch.where(causal, mask, -torch.inf)


def cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(query.shape[3], value.shape[3])
    padded = [_padded(operand, width) for operand in (query, key, value)]
    padded = [x if x.stride(3) == 1 or width == 1 else x.contiguous() for x in padded]
    additive = mask
    if mask is not None and mask.dtype == torch.bool:
        # With finfo.min instead of -inf a fully masked row gets lse = -3.4e38 and the values' mean.
        additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *padded, 0.0, is_causal, attn_mask=additive, scale=scale
    )
    output = output[..., : value.shape[3]]
    suspect = (lse == 0.0) | (lse == torch.inf)
    if mask is not None:
        seen = (mask if mask.dtype == torch.bool else mask != -torch.inf).any(-1)
        output.masked_fill_(~seen[..., None], 0.0)
        lse.masked_fill_(~seen, -torch.inf)
        suspect &= seen
    if suspect.any():
        # The kernel's 0.0 also stands for "every score is NaN" and "every score is -inf"; its +inf
        # for an infinite score, beside an output that is NaN in float32 and finite in bfloat16.
        if is_causal:
            mask = with_causal(None, query, key.shape[2])
        exact = matmul(query, key, value, mask, scale)
        output = torch.where(suspect[..., None], exact[0], output)
        lse = torch.where(suspect, exact[1], lse)
    return output, lse


def cuda_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(query.shape[3], value.shape[3])
    width = -(-width // _CUDA_HEAD_SIZE_MULTIPLE) * _CUDA_HEAD_SIZE_MULTIPLE
    padded = [_aligned(_padded(operand, width)) for operand in (query, key, value)]
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *padded, 0.0, is_causal, False, scale=scale
    )
    return output[..., : value.shape[3]], lse


def matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = unseen(query, value)
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.to(lse.dtype).repeat_interleave(groups, 1) for x in (key, value))
    block = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], block):
        rows = slice(start, start + block)
        scores = query[:, :, rows].to(lse.dtype) @ wide_key.mT * scale
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            is_bool = part.dtype == torch.bool
            scores = scores.masked_fill(~part, -torch.inf) if is_bool else scores + part
        lse[:, :, rows] = scores.logsumexp(-1)
        weighted = scores.softmax(-1) @ wide_value
        # softmax gives NaN to a row without a key.
        weighted.masked_fill_(lse[:, :, rows, None] == -torch.inf, 0.0)
        output[:, :, rows] = weighted.to(query.dtype)
    return output, lse


def _padded(operand: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros up to `width` elements a head: they add nothing to a score and are sliced off V."""
    missing = width - operand.shape[3]
    return F.pad(operand, (0, missing)) if missing else operand


def _aligned(operand: torch.Tensor) -> torch.Tensor:
    strides = [s for s, n in zip(operand.stride()[:3], operand.shape[:3], strict=True) if n > 1]
    in_bytes = [operand.data_ptr(), *(s * operand.element_size() for s in strides)]
    if operand.stride(3) == 1 and not any(position % _CUDA_ALIGNMENT for position in in_bytes):
        return operand
    return operand.clone(memory_format=torch.contiguous_format)
