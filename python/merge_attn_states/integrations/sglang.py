"""SGLang's merges, by their names, arguments and results, through this package.

What `sgl_kernel.merge_state_v2` (sglang-kernel 0.4.10) and
`sglang.srt.layers.attention.merge_state.merge_state` (0.5.23) do, and what the functions here do
instead:

| SGLang's                                                   | here                              |
| ---------------------------------------------------------- | --------------------------------- |
| contiguous operands: others are refused by CUDA and read   | any strides: FlashAttention's LSE |
|   as contiguous by Triton, so that callers copy            |   [H, N] is `lse.T`               |
|   FlashAttention's LSE                                     |                                   |
| both LSEs infinite: NaN; an empty part's NaN reaches the   | zeros and -inf; an empty part's   |
|   result                                                   |   values are never used           |
| head sizes that are no multiple of 16 bytes, and FP8: only | any head size; float64 and FP8    |
|   `merge_state`, by Triton                                 |   too                             |
| an LSE that is not float32 is converted (merge_state_v2)   | refused by name                   |
| v_a and v_b of different dtypes are read as one            | a new result is float32           |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import states
from ._names import renamed

__all__ = ["merge_state", "merge_state_v2"]

_OURS = ("outputs[0]", "lses[0]", "outputs[1]", "lses[1]", "out", "out_lse")


def _names(*theirs: str) -> Mapping[str, str]:
    return dict(zip(_OURS, theirs, strict=True))


_V2 = _names("v_a", "s_a", "v_b", "s_b", "v_merged", "s_merged")
_OF_PARTS = _names(
    *("prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output", "output_lse")
)


def merge_state_v2(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states, as `sgl_kernel.merge_state_v2` does.

    Parameters
    ----------
    v_a, v_b : torch.Tensor
        [num_tokens, num_heads, head_size], any strides.
    s_a, s_b : torch.Tensor
        [num_tokens, num_heads], float32 (float64 for float64 outputs), natural log, any strides.
        -inf and +inf: the part saw no keys.
    v_merged, s_merged : torch.Tensor, optional
        Written and returned; new where None. May be exactly one of the parts.

    Returns
    -------
    tuple of torch.Tensor
        v_merged [num_tokens, num_heads, head_size], and s_merged [num_tokens, num_heads].

    Raises
    ------
    TypeError, ValueError, UnavailableError, RuntimeError
        As for `merge_attn_states.merge_states`, by the names of this function's arguments.

    Examples
    --------
    FlashAttention's LSE, [num_heads, num_tokens], needs no copy:

    >>> import torch
    >>> from merge_attn_states.integrations import sglang
    >>> v_a, v_b = torch.zeros(4, 8, 64), torch.ones(4, 8, 64)
    >>> lse_a, lse_b = torch.zeros(8, 4), torch.zeros(8, 4)
    >>> v, s = sglang.merge_state_v2(v_a, lse_a.T, v_b, lse_b.T)
    >>> float(v[0, 0, 0]), round(float(s[0, 0]), 5)
    (0.5, 0.69315)
    """
    return _merge(_V2, v_a, s_a, v_b, s_b, v_merged, s_merged)


def merge_state(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output: torch.Tensor | None = None,
    output_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states, as `sglang.srt.layers.attention.merge_state.merge_state` does.

    `merge_state_v2` by the names that SGLang gives its Python function.

    Parameters
    ----------
    prefix_output, suffix_output : torch.Tensor
        [num_tokens, num_heads, head_size], any strides.
    prefix_lse, suffix_lse : torch.Tensor
        [num_tokens, num_heads], float32 (float64 for float64 outputs), natural log, any strides.
    output, output_lse : torch.Tensor, optional
        Written and returned; new where None. May be exactly one of the parts.

    Returns
    -------
    tuple of torch.Tensor
        output [num_tokens, num_heads, head_size], and output_lse [num_tokens, num_heads].

    Raises
    ------
    TypeError, ValueError, UnavailableError, RuntimeError
        As for `merge_attn_states.merge_states`, by the names of this function's arguments.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states.integrations import sglang
    >>> prefix, suffix = torch.zeros(4, 8, 64), torch.ones(4, 8, 64)
    >>> lse = torch.zeros(4, 8)
    >>> output, output_lse = sglang.merge_state(prefix, lse, suffix, lse)
    >>> float(output[0, 0, 0])
    0.5
    """
    return _merge(
        _OF_PARTS, prefix_output, prefix_lse, suffix_output, suffix_lse, output, output_lse
    )


def _merge(
    names: Mapping[str, str],
    a: torch.Tensor,
    lse_a: torch.Tensor,
    b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor | None,
    out_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        merged, lse = states.merge_states([a, b], [lse_a, lse_b], out=out, out_lse=out_lse)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from None
    assert lse is not None
    return merged, lse
