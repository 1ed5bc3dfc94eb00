"""Attention and its log-sum-exp from PyTorch's own kernels: what a merge needs as its input.

What `aten::_scaled_dot_product_flash_attention_for_cpu` (CPU) and
`aten::_scaled_dot_product_flash_attention` (CUDA) do, and what `attention_with_lse` gives instead
(PyTorch 2.11 and 2.13):

| PyTorch's kernel                                           | here                              |
| ---------------------------------------------------------- | --------------------------------- |
| CPU refuses a bool mask, CUDA takes no mask                | additive -inf mask; matmul        |
| a key that is NaN, infinite or so large that its score is  | hidden keys and values are never  |
|   reaches rows that it is hidden from (CPU, by a mask),    |   used, whatever they hold; rows  |
|   and a value that is not finite too (CPU; CUDA, causal)   |   that see them show them         |
| CPU, fully masked row: lse = 0.0, a finite lie             | lse = -inf, output zeros          |
| CPU, fewer keys than a vector has lanes, every score NaN:  | lse and output NaN; a row whose   |
|   lse = 0.0 and zeros                                      |   lse is 0.0 is computed again    |
| CUDA, a row without keys or with a NaN score: lse = +inf   | -inf; NaN                         |
| CPU, an infinite score: lse = +inf, and in bfloat16 a      | both NaN                          |
|   finite output                                            |                                   |
| CPU with AVX-512, a NaN score: may be taken for a number   | both NaN                          |
| CPU dies of SIGFPE where there are no queries or no keys   | answered without the kernel       |
| CPU reads an element stride other than 1 as 1              | copied first                      |
| CUDA reads 16 bytes at a time, wherever they lie           | copied first where misaligned     |
| V must be as wide as Q; on CUDA a multiple of 8, up to 256 | padded and sliced; wider: matmul  |
| CUDA knows float16 and bfloat16 from compute capability 8  | the others: matmul                |
| causal: CPU aligns top-left, CUDA bottom-right             | bottom-right                      |
| autocast lowers the matmuls of what stands around them     | not lowered: operands as given    |
| CPU, causal, a scale of 0 or less: NaN; CUDA takes the     | by a mask; matmul                 |
|   smallest score for the largest                           |                                   |
| the LSE has no derivative, and PyTorch does not say so     | what has or wants one is refused  |
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch

from .. import _operator
from . import _pytorch_kernels as kernels
from ._pytorch_operands import check_tensors, is_known, validate

__all__ = ["AttentionKernel", "attention_kernel", "attention_with_lse", "token_layout"]

AttentionKernel = Literal["cpu_flash", "cuda_flash", "matmul", "none"]

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
        query sees no key, or scores of -inf alone; NaN where a score is NaN or +inf. Never +inf.

    See Also
    --------
    token_layout : the views of both that the merge takes.

    Notes
    -----
    A key or value that a row does not see changes nothing in that row, be it NaN, infinite or
    huge, as in the slots of a cache that nobody has written. On the CPU that costs a sum over both
    (beside a mask norms of query and key), and the rows that see such a key, or whose LSE is
    exactly 0, are computed again by matmul. On CUDA, where no value is looked at, it costs passes
    over the values where `is_causal`, and where there is a mask a product twice as wide as the one
    with the values.

    In a graph of `torch.compile` or `torch.export` all of it is one operator,
    `torch.ops.merge_attn_states.attention_with_lse`, which importing this module registers: a
    program that was exported and loaded elsewhere needs the import. Errors are RuntimeErrors
    there that contain the same sentence. Under autocast nothing is lowered.

    Raises
    ------
    TypeError
        An operand is not a tensor.
    ValueError
        A shape, dtype, device or scale does not fit, or an operand requires grad under grad mode or
        has a tangent of forward mode.

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
    check_tensors(query, key, value, attn_mask)
    operator = torch.ops.merge_attn_states.attention_with_lse
    output, lse = operator(query, key, value, attn_mask, is_causal, scale)
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
        float64, heads wider than 256, a scale of 0 or less; everything on other devices. "none":
        no queries or no keys.
    """
    check_tensors(query, key, value, attn_mask)
    validate(query, key, value, attn_mask, scale)
    return _choose(query, key, value, attn_mask, scale)


def token_layout(output: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of `attention_with_lse` in the layout that the merge takes.

    Views where the strides allow it, as they do for what `attention_with_lse` gives: its output is
    stored as [batch, num_queries, num_heads, value_head_size]. (The LSE of the CUDA kernel, 4 bytes
    a row, is copied for a batch of more than one.)

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


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> kernels.State:
    """The operator on real tensors."""
    validate(query, key, value, attn_mask, scale)
    kernel = _choose(query, key, value, attn_mask, scale)
    if kernel == "none":
        return kernels.unseen(query, value)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    device = query.device.type
    lowers = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowers else nullcontext():
        return _run_kernel(kernel, query, key, value, attn_mask, is_causal, scale)


def _run_kernel(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> kernels.State:
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_causal = is_causal and num_queries > 1  # one query is the newest token and sees every key
    if _starts_before_the_keys(query, key, attn_mask, is_causal):
        # The first rows see no key; the others are the square that every kernel does alike.
        output, lse = kernels.unseen(query, value)
        square = query[:, :, num_queries - num_keys :]
        state = _run_kernel(kernel, square, key, value, None, True, scale)
        output[:, :, -num_keys:], lse[:, :, -num_keys:] = state
        return output, lse
    mask = None if attn_mask is None else kernels.four_dimensions(attn_mask)
    if is_causal and not _does_causal(kernel, num_queries, num_keys, mask, scale):
        mask, is_causal = kernels.with_causal(mask, query, num_keys), False
    if kernel == "cuda_flash":
        return kernels.cuda_flash(query, key, value, is_causal, scale)
    if kernel == "cpu_flash":
        return kernels.cpu_flash(query, key, value, mask, is_causal, scale)
    return kernels.matmul(query, key, value, mask, scale)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> kernels.State:
    """Shapes, dtypes and strides of what `_run` gives."""
    validate(query, key, value, attn_mask, scale)
    output, lse = kernels.unseen(query, value)
    by_head = _choose(query, key, value, attn_mask, scale) == "cuda_flash"
    by_head = by_head and not _starts_before_the_keys(query, key, attn_mask, is_causal)
    return output, lse.contiguous() if by_head else lse


def _choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
) -> AttentionKernel:
    if any(is_known(size == 0) for size in (*query.shape, key.shape[2])):
        return "none"
    if query.device.type == "cpu":
        return "cpu_flash"
    fits = (
        query.device.type == "cuda"
        and attn_mask is None
        and (scale is None or scale > 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(query.shape[3], value.shape[3]) <= _CUDA_HEAD_SIZE_LIMIT
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    return "cuda_flash" if fits else "matmul"


def _starts_before_the_keys(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool
) -> bool:
    return is_causal and attn_mask is None and query.shape[2] > key.shape[2]


def _does_causal(
    kernel: AttentionKernel,
    num_queries: int,
    num_keys: int,
    mask: torch.Tensor | None,
    scale: float,
) -> bool:
    """Whether the kernel's own causal flag is right, and aligned bottom-right, here."""
    if kernel == "cpu_flash":
        return mask is None and num_queries == num_keys and scale > 0
    return kernel == "cuda_flash"


# One operator for all of it: a graph holds no branch on values (CPU) or addresses (CUDA).
_library = torch.library.Library("merge_attn_states", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attention_with_lse(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float? scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl(  # type: ignore[no-untyped-call]
    "attention_with_lse", _run, "CompositeExplicitAutograd"
)
torch.library.register_fake("merge_attn_states::attention_with_lse", _fake, lib=_library)
_operator.register(
    torch.ops.merge_attn_states.attention_with_lse.default,
    "PyTorch's kernels give no derivative of the lse",
)
