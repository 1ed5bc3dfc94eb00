"""Attention and its log-sum-exp from PyTorch's own kernels: what a merge needs as its input.

What `aten::_scaled_dot_product_flash_attention_for_cpu` (CPU) and
`aten::_scaled_dot_product_flash_attention` (CUDA) do, and what `attention_with_lse` gives instead
(PyTorch 2.11 and 2.13):

| PyTorch's kernel                                           | here                              |
| ---------------------------------------------------------- | --------------------------------- |
| CPU refuses a bool mask, CUDA takes no mask                | additive -inf mask; matmul        |
| CPU, fully masked row: lse = 0.0, a finite lie             | lse = -inf, output zeros          |
| CPU, fewer keys than a vector has lanes, every score NaN:  | lse and output NaN                |
|   lse = 0.0 and zeros                                      |                                   |
| CUDA, a row without keys or with a NaN score: lse = +inf   | -inf; NaN                         |
| CPU, an infinite score: lse = +inf, and in bfloat16 a      | both NaN                          |
|   finite output                                            |                                   |
| CPU dies of SIGFPE where there are no queries or no keys   | answered without the kernel       |
| CPU reads an element stride other than 1 as 1              | copied first                      |
| CUDA reads 16 bytes at a time, wherever they lie           | copied first where misaligned     |
| V must be as wide as Q; on CUDA a multiple of 8, up to 256 | padded and sliced; wider: matmul  |
| CUDA knows float16 and bfloat16 from compute capability 8  | the others: matmul                |
| causal: CPU aligns top-left, CUDA bottom-right             | bottom-right                      |
| the LSE has no gradient, and PyTorch does not say so       | refused where grad is required    |
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from . import _pytorch_kernels as kernels

__all__ = ["AttentionKernel", "attention_kernel", "attention_with_lse", "token_layout"]

AttentionKernel = Literal["cpu_flash", "cuda_flash", "matmul", "none"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CUDA_HEAD_SIZE_LIMIT = 256


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over `key` and `value`, with the log-sum-exp of each row's scores.

    Parameters
    ----------
    query : torch.Tensor
        [batch, num_heads, num_queries, head_size], float16, bfloat16, float32 or float64, any
        strides.
    key : torch.Tensor
        [batch, num_kv_heads, num_keys, head_size]. num_heads must be a multiple of num_kv_heads:
        consecutive query heads share a key head (grouped queries).
    value : torch.Tensor
        [batch, num_kv_heads, num_keys, value_head_size]; narrower or wider than `query` is fine.
    attn_mask : torch.Tensor, optional
        Broadcasts to [batch, num_heads, num_queries, num_keys]. torch.bool, True where a query
        sees a key, or `query`'s dtype, added to the scaled scores.
    is_causal : bool, optional
        A query sees no key after its own, the last query being the last key's (bottom-right, as
        in FlashAttention: the queries are the newest tokens of the keys). `attn_mask` may be
        given too. Queries before the first key see nothing.
    scale : float, optional
        Multiplies the scores. None means 1 / sqrt(head_size).

    Returns
    -------
    output : torch.Tensor
        [batch, num_heads, num_queries, value_head_size] in `query`'s dtype. Zeros where a query
        sees no key.
    lse : torch.Tensor
        [batch, num_heads, num_queries], natural log, float32 (float64 for float64). -inf where a
        query sees no key, NaN where a score is NaN or infinite. Never +inf.

    See Also
    --------
    token_layout : the views of both that the merge takes.

    Raises
    ------
    TypeError
        An operand is not a tensor.
    ValueError
        A shape, dtype, device or scale does not fit, or an operand requires grad under grad mode.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states.integrations.pytorch import attention_with_lse
    >>> query, key, value = torch.randn(3, 1, 4, 6, 64)
    >>> seen = torch.ones(6, 6, dtype=torch.bool)
    >>> seen[2] = False
    >>> output, lse = attention_with_lse(query, key, value, seen)
    >>> lse[0, :, 2]
    tensor([-inf, -inf, -inf, -inf])
    """
    _validate(query, key, value, attn_mask, scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    kernel = _choose(query, key, value, attn_mask)
    if kernel == "none":
        return kernels.unseen(query, value)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    is_causal = is_causal and num_queries > 1  # one query is the newest token and sees every key

    if is_causal and attn_mask is None and num_queries > num_keys:
        # The first rows see no key; the others are the square that every kernel does alike.
        output, lse = kernels.unseen(query, value)
        first = num_queries - num_keys
        output[:, :, first:], lse[:, :, first:] = attention_with_lse(
            query[:, :, first:], key, value, is_causal=True, scale=scale
        )
        return output, lse
    mask = None if attn_mask is None else kernels.four_dimensions(attn_mask)
    if is_causal and not _does_causal(kernel, num_queries, num_keys, mask):
        mask, is_causal = kernels.with_causal(mask, query, num_keys), False

    if kernel == "cuda_flash":
        output, lse = kernels.cuda_flash(query, key, value, is_causal, scale)
    elif kernel == "cpu_flash":
        output, lse = kernels.cpu_flash(query, key, value, mask, is_causal, scale)
    else:
        output, lse = kernels.matmul(query, key, value, mask, scale)
    # The merge takes +inf for an empty part, which would hide the NaN beside it.
    infinite = lse == torch.inf
    lse.masked_fill_(infinite, -torch.inf)
    if value.shape[3]:
        lse.masked_fill_(infinite & output[..., 0].isnan(), torch.nan)
    return output, lse


def attention_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> AttentionKernel:
    """Which kernel `attention_with_lse` runs for these arguments.

    Parameters
    ----------
    query, key, value, attn_mask, is_causal, scale
        As in `attention_with_lse`.

    Returns
    -------
    str
        "cpu_flash" and "cuda_flash" are PyTorch's flash kernels, "matmul" is matmul and
        logsumexp in float32 (float64 for float64), where no kernel fits: on CUDA a mask, float32,
        float64, heads wider than 256; everything on other devices. "none": no queries or no keys.
    """
    _validate(query, key, value, attn_mask, scale)
    return _choose(query, key, value, attn_mask)


def token_layout(output: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of `attention_with_lse` in the layout that the merge takes.

    Views where the strides allow it: always for a batch of one; for more where the query is stored
    [batch, num_queries, num_heads, head_size], as models do, since the output is laid out like the
    query. (The LSE of the CUDA kernel, 4 bytes a row, is copied for a batch of more than one.)

    Parameters
    ----------
    output : torch.Tensor
        [batch, num_heads, num_queries, value_head_size].
    lse : torch.Tensor
        [batch, num_heads, num_queries].

    Returns
    -------
    output : torch.Tensor
        [batch * num_queries, num_heads, value_head_size].
    lse : torch.Tensor
        [num_heads, batch * num_queries].
    """
    if output.dim() != 4 or lse.shape != output.shape[:3]:
        raise ValueError(
            "lse: expected output's shape [batch, num_heads, num_queries, value_head_size] without "
            f"its last dimension, got {list(lse.shape)} beside {list(output.shape)}"
        )
    return output.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)


def _validate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
) -> None:
    names = ("num_heads", "num_queries"), ("num_kv_heads", "num_keys"), ("num_kv_heads", "num_keys")
    operands = {"query": query, "key": key, "value": value}
    for (name, operand), (heads, tokens) in zip(operands.items(), names, strict=True):
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(operand).__name__}")
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
        if torch.is_grad_enabled() and operand.requires_grad:
            raise ValueError(
                f"{name}: requires grad, but PyTorch's kernels give no gradient of the lse; call "
                "under torch.no_grad() or detach it"
            )
    batch, num_heads, num_queries, head_size = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    if head_size == 0:
        raise ValueError(f"query: expected a head_size of at least 1, got {list(query.shape)}")
    if key.shape[0] != batch or key.shape[3] != head_size:
        raise ValueError(
            f"key: expected shape [{batch}, num_kv_heads, num_keys, {head_size}], "
            f"got {list(key.shape)}"
        )
    if num_heads % num_kv_heads if num_kv_heads else num_heads:
        raise ValueError(f"key: expected num_kv_heads to divide {num_heads}, got {num_kv_heads}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected shape [{batch}, {num_kv_heads}, {num_keys}, value_head_size], "
            f"got {list(value.shape)}"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale}")
    if attn_mask is None:
        return
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor, got {type(attn_mask).__name__}")
    scores = [batch, num_heads, num_queries, num_keys]
    if attn_mask.dim() > 4 or any(
        size not in (1, full)
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
    if torch.is_grad_enabled() and attn_mask.requires_grad:
        raise ValueError("attn_mask: requires grad, which is not supported; detach it")


def _choose(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> AttentionKernel:
    if query.numel() == 0 or key.shape[2] == 0:
        return "none"
    if query.device.type == "cpu":
        return "cpu_flash"
    fits = (
        query.device.type == "cuda"
        and attn_mask is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(query.shape[3], value.shape[3]) <= _CUDA_HEAD_SIZE_LIMIT
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    return "cuda_flash" if fits else "matmul"


def _does_causal(
    kernel: AttentionKernel, num_queries: int, num_keys: int, mask: torch.Tensor | None
) -> bool:
    """Whether the kernel's own causal flag is aligned bottom-right here."""
    if kernel == "cpu_flash":
        return mask is None and num_queries == num_keys
    return kernel == "cuda_flash"
