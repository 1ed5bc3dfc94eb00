"""What `pytorch.attention_with_lse` and its operator refuse, and the sentences that say so."""

from __future__ import annotations

import math

import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> None:
    operands = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        operands["attn_mask"] = attn_mask
    for name, operand in operands.items():
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(operand).__name__}")


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether it holds; what cannot be known while compiling, of unbacked sizes, does not."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import

    return guard_or_false(condition)


def validate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
) -> None:
    names = ("num_heads", "num_queries"), ("num_kv_heads", "num_keys"), ("num_kv_heads", "num_keys")
    operands = {"query": query, "key": key, "value": value}
    for (name, operand), (heads, tokens) in zip(operands.items(), names, strict=True):
        if operand.dim() != 4:
            raise ValueError(
                f"{name}: expected shape [batch, {heads}, {tokens}, head_size], "
                f"got {list(operand.shape)}"
            )
        if operand.dtype not in _DTYPES or operand.dtype != query.dtype:
            one_of = "one of float16, bfloat16, float32, float64, the same for all three"
            raise ValueError(f"{name}: expected dtype {one_of}, got {operand.dtype}")
        if operand.device != query.device:
            raise ValueError(f"{name}: expected device {query.device}, got {operand.device}")
    batch, num_heads, num_queries, head_size = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    if is_known(head_size == 0):
        raise ValueError(f"query: expected a head_size of at least 1, got {list(query.shape)}")
    if is_known(key.shape[0] != batch) or is_known(key.shape[3] != head_size):
        raise ValueError(
            f"key: expected shape [{batch}, num_kv_heads, num_keys, {head_size}], "
            f"got {list(key.shape)}"
        )
    if is_known(num_kv_heads == 0):
        divides = is_known(num_heads == 0)
    else:
        divides = not is_known(num_heads % num_kv_heads != 0)
    if not divides:
        raise ValueError(f"key: expected num_kv_heads to divide {num_heads}, got {num_kv_heads}")
    if any(is_known(a != b) for a, b in zip(value.shape[:3], key.shape[:3], strict=True)):
        raise ValueError(
            f"value: expected shape [{batch}, {num_kv_heads}, {num_keys}, value_head_size], "
            f"got {list(value.shape)}"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale}")
    if attn_mask is None:
        return
    scores = [batch, num_heads, num_queries, num_keys]
    if attn_mask.dim() > 4 or any(
        is_known(size != 1) and is_known(size != full)
        for size, full in zip(attn_mask.shape[::-1], scores[::-1], strict=False)
    ):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {scores} = [batch, num_heads, "
            f"num_queries, num_keys], got {list(attn_mask.shape)}"
        )
    if attn_mask.dtype not in (torch.bool, query.dtype):
        expected = f"torch.bool or query's dtype {query.dtype}"
        raise ValueError(f"attn_mask: expected dtype {expected}, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: expected device {query.device}, got {attn_mask.device}")
