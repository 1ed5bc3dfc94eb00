"""The kernels behind `pytorch.attention_with_lse`, each with what it needs to be right.

Arguments are validated, there is at least one query and one key, and a mask has four dimensions.
Shapes are those of `attention_with_lse`. What a CPU kernel does may depend on the operands' values;
on CUDA nothing does, since to look at a value is to wait for the GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's documentation gives it)

State = tuple[torch.Tensor, torch.Tensor]

_CUDA_HEAD_SIZE_MULTIPLE = 8
_CUDA_ALIGNMENT = 16
# Scores that the matmul path holds at once (256 MiB in float32): queries are taken in blocks, so
# that a long sequence does not need [queries, keys] of memory.
_SCORES_AT_ONCE = 1 << 26


def unseen(query: torch.Tensor, value: torch.Tensor) -> State:
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
) -> State:
    """A mask, or a causal square, or neither."""
    # The kernel multiplies hidden values by 0 and adds -inf to hidden scores: it must not meet NaN,
    # nor infinity, which the score of a finite key may be too.
    limit = math.inf if mask is None else _largest_of_finite_scores(query, scale)
    broken = _broken(key, value, limit)
    clean = [key, value]
    if broken is not None:
        clean = [x.masked_fill(broken[..., None], 0.0) for x in clean]
    width = max(query.shape[3], value.shape[3])
    padded = [_padded(operand, width) for operand in (query, *clean)]
    padded = [x if x.stride(3) == 1 or width == 1 else x.contiguous() for x in padded]
    additive = mask
    if mask is not None and mask.dtype == torch.bool:
        # With finfo.min instead of -inf a fully masked row gets lse = -3.4e38 and the values' mean.
        additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *padded, 0.0, is_causal, attn_mask=additive, scale=scale
    )
    output = _by_token(output[..., : value.shape[3]])

    # The kernel's 0.0 also stands for "every score is NaN" and "every score is -inf".
    suspect = lse == 0.0
    if broken is not None:
        suspect |= _sees_one_of(broken, mask, is_causal, *query.shape[1:3])
    if mask is not None:
        sees_a_key = _seen(mask).any(-1)
        output.masked_fill_(~sees_a_key[..., None], 0.0)
        lse.masked_fill_(~sees_a_key, -torch.inf)
        suspect &= sees_a_key
    # +inf is an infinite score, beside an output that is finite in bfloat16; and where a score is
    # NaN, the exponential of some processors makes a number of it.
    wrong = ~(lse < torch.inf)
    if wrong.any():
        output.masked_fill_(wrong[..., None], torch.nan)
        lse.masked_fill_(wrong, torch.nan)
    if suspect.any():
        _recompute(suspect, (output, lse), query, key, value, mask, is_causal, scale)
    return output, lse


def cuda_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> State:
    """Causal with at most as many queries as keys, or without any mask."""
    clean = value
    if is_causal:
        # The kernel writes -inf over hidden scores, but multiplies hidden values by 0.
        clean = _finite(value)
    width = max(query.shape[3], value.shape[3])
    width = -(-width // _CUDA_HEAD_SIZE_MULTIPLE) * _CUDA_HEAD_SIZE_MULTIPLE
    padded = [_aligned(_padded(operand, width)) for operand in (query, key, clean)]
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *padded, 0.0, is_causal, False, scale=scale
    )
    # +inf is a row without keys or, beside a NaN, a score that is NaN or infinite. Where the kernel
    # splits the keys, a part with such a score counts as one without keys, and the LSE is a number.
    infinite = lse == torch.inf
    broken = ~key.sum(-1, dtype=torch.float32).isfinite()
    wrong = infinite | _sees_one_of(broken, None, is_causal, *query.shape[1:3])
    lse.masked_fill_(infinite, -torch.inf).masked_fill_(wrong & output[..., 0].isnan(), torch.nan)
    output = _by_token(output[..., : value.shape[3]])
    if is_causal:
        # What is not finite in a row's own value and those before it: 0, +-inf or NaN.
        missing = (value - clean).cumsum(2)[:, :, key.shape[2] - query.shape[2] :]
        torch.unflatten(output, 1, (key.shape[1], -1)).add_(missing[:, :, None])
    return output, lse


def matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> State:
    output, lse = unseen(query, value)
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.to(lse.dtype).repeat_interleave(groups, 1) for x in (key, value))
    marks = None if mask is None else _marks(wide_value)
    if marks is not None:
        wide_value = _finite(wide_value)
    block = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], block):
        rows = slice(start, start + block)
        scores = query[:, :, rows].to(lse.dtype) @ wide_key.mT * scale
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            scores = scores if part.dtype == torch.bool else scores + part
            seen = _seen(part)
            scores = scores.masked_fill(~seen, -torch.inf)  # NaN + -inf would be NaN
        part_lse = scores.logsumexp(-1)
        weighted = scores.softmax(-1) @ wide_value
        if marks is not None:
            plus, minus = (_sum_of_seen(seen, marks) > 0).chunk(2, -1)
            weighted += torch.where(plus, torch.inf, 0.0) - torch.where(minus, torch.inf, 0.0)
        # softmax gives NaN to a row without a key; an infinite score has no softmax.
        weighted.masked_fill_(part_lse[..., None] == -torch.inf, 0.0)
        output[:, :, rows] = weighted.to(query.dtype)
        lse[:, :, rows] = part_lse.masked_fill(part_lse == torch.inf, torch.nan)
    return output, lse


def _recompute(
    rows: torch.Tensor,
    state: State,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> None:
    """Write over the state what `matmul` gives for `rows` [batch, num_heads, num_queries]."""
    (num_kv_heads, num_keys), groups = key.shape[1:3], query.shape[1] // key.shape[1]
    every = rows.nonzero()  # [.., 3], in the order of batch and head, so that those of a pair meet
    pairs = every[:, 0] * num_kv_heads + every[:, 1] // groups
    _, counts = torch.unique_consecutive(pairs, return_counts=True)
    for of_a_pair in torch.split(every, counts.tolist()):
        for some in torch.split(of_a_pair, max(1, _SCORES_AT_ONCE // num_keys)):
            at = some.unbind(1)
            batch, kv_head = int(some[0, 0]), int(some[0, 1]) // groups
            keys, values = (x[batch, kv_head][None, None] for x in (key, value))
            if mask is not None:
                seen = mask.expand(*rows.shape, num_keys)[at]
            else:  # every key, or those up to the query's own
                last = at[2] if is_causal else torch.full_like(at[2], num_keys)
                seen = torch.arange(num_keys) <= last[:, None]
            exact = matmul(query[at][None, None], keys, values, seen[None, None], scale)
            for whole, part in zip(state, exact, strict=True):
                whole[at] = part[0, 0]


def _broken(key: torch.Tensor, value: torch.Tensor, limit: float) -> torch.Tensor | None:
    """Which keys are not finite in key and value, or beyond the limit; None: none.

    bool [batch, num_kv_heads, num_keys].
    """
    # A sum and a norm are finite only where all elements are, no element exceeds the norm, and they
    # are the fastest ways through memory. Where they overflow, as in float16 a sum often would,
    # that costs no more than the second look.
    dtype = torch.float32 if key.dtype == torch.float16 else None
    total = value.sum(dtype=dtype)
    if math.isinf(limit):
        if (key.sum(dtype=dtype) + total).isfinite():
            return None
    elif total.isfinite() and torch.linalg.vector_norm(key) <= limit:
        return None
    broken = ~(key.isfinite().all(-1) & value.isfinite().all(-1))
    if not math.isinf(limit):
        broken |= key.abs().amax(-1) > limit
    return broken if broken.any() else None


def _largest_of_finite_scores(query: torch.Tensor, scale: float) -> float:
    """How large a key's elements may be while no score with what is finite of `query` overflows."""
    largest = float(torch.linalg.vector_norm(query))  # or less
    if not math.isfinite(largest):
        largest = float(query.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    of_score = max(1.0, abs(scale)) * query.shape[3] * largest
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.finfo(dtype).max / max(2 * of_score, 1.0)  # 2: norms are rounded


def _sees_one_of(
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    num_heads: int,
    num_queries: int,
) -> torch.Tensor:
    """Which rows see one of `keys` (bool [batch, num_kv_heads, num_keys])."""
    keys = keys.repeat_interleave(num_heads // keys.shape[1], 1)
    if mask is not None:
        return _sum_of_seen(_seen(mask), keys[..., None].float())[..., 0] > 0
    if not is_causal:
        return keys.any(-1, keepdim=True)
    return keys.cumsum(-1)[..., keys.shape[-1] - num_queries :] > 0


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def _sum_of_seen(seen: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Over the keys that each row sees; `numbers` are [batch, num_heads, num_keys, any]."""
    return torch.einsum("bhqk,bhkn->bhqn", seen.to(numbers.dtype), numbers)


def _finite(value: torch.Tensor) -> torch.Tensor:
    return value.nan_to_num(0.0, 0.0, 0.0)


def _marks(value: torch.Tensor) -> torch.Tensor | None:
    """1 where a value is +inf, and behind it 1 where it is -inf; NaN is both. None: all finite."""
    if value.device.type == "cpu" and value.isfinite().all():
        return None
    infinite = [(value == sign * torch.inf) | value.isnan() for sign in (1, -1)]
    return torch.cat(infinite, -1).to(value.dtype)


def _by_token(operand: torch.Tensor) -> torch.Tensor:
    """Stored as [batch, tokens, heads, head_size], the layout that the merge reads in one piece."""
    return operand.transpose(1, 2).contiguous().transpose(1, 2)


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
