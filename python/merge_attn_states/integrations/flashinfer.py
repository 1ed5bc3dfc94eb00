"""FlashInfer's merges, by their names, arguments and results, through this package.

What `flashinfer.merge_state`, `merge_state_in_place` and `merge_states` do (0.7.2.post1), and what
the functions here do instead:

| FlashInfer's                                               | here                              |
| ---------------------------------------------------------- | --------------------------------- |
| float16 and bfloat16 on CUDA; contiguous operands          | float32, float64, FP8 too; on the |
|                                                            |   CPU too; any strides            |
| a token's heads are one block of at most 1,024 threads: 65 | any number of heads, any head_dim |
|   heads of 128 are refused; head_dim 64, 128, 256, 512     |                                   |
| where one s is -inf, a NaN in its v reaches the result     | an empty part's v is never used   |
| where one s is +inf, both are lost: zeros and s = NaN      | +inf means empty, as -inf does    |
| where one s is NaN, it counts as empty                     | NaN: v and s of that row are NaN  |
| an s that is not float32 is converted; in place a copy is  | refused by name                   |
|   updated, and the caller's s stays as it was              |                                   |
| the mask is read as contiguous bytes, whatever it is       | bool, any strides                 |
| a row that the mask leaves out is not touched              | keeps its bits; where its own s   |
|                                                            |   is infinite it becomes 0 and    |
|                                                            |   -inf, where that is NaN, NaN    |
| v_a and v_b of different dtypes are read as one            | the result is float32; in place   |
|                                                            |   that of v                       |
| any number of states, none too                             | 1 to 1,024                        |
"""

from __future__ import annotations

import torch

from .. import states
from ._names import renamed

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]

_PAIR = {"outputs[0]": "v_a", "lses[0]": "s_a", "outputs[1]": "v_b", "lses[1]": "s_b"}
_IN_PLACE = {
    "out": "v",
    "lse": "s",
    "block_out": "v_other",
    "block_lse": "s_other",
    "empty": "mask",
}
_STACK = {"outputs": "v", "lses": "s"}


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states, as `flashinfer.merge_state` does.

    Parameters
    ----------
    v_a, v_b : torch.Tensor
        [num_tokens, num_heads, head_dim], any strides.
    s_a, s_b : torch.Tensor
        [num_tokens, num_heads], float32 (float64 for float64 outputs), logarithm to base 2, any
        strides. -inf and +inf: the part saw no keys.

    Returns
    -------
    tuple of torch.Tensor
        v [num_tokens, num_heads, head_dim], and s [num_tokens, num_heads] to base 2.

    Raises
    ------
    TypeError, ValueError, UnavailableError, RuntimeError
        As for `merge_attn_states.merge_states`, by the names of this function's arguments.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states.integrations import flashinfer
    >>> v_a, v_b = torch.zeros(4, 8, 64), torch.ones(4, 8, 64)
    >>> s = torch.zeros(4, 8)
    >>> v, s = flashinfer.merge_state(v_a, s, v_b, s + 1)
    >>> round(float(v[0, 0, 0]), 5), round(float(s[0, 0]), 5)  # 2 / 3 and log2(3)
    (0.66667, 1.58496)
    """
    try:
        v, s = states.merge_states([v_a, v_b], [s_a, s_b], lse_base="2")
    except (TypeError, ValueError) as error:
        raise renamed(error, _PAIR) from None
    assert s is not None
    return v, s


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """Merge another attention state into (v, s), as `flashinfer.merge_state_in_place` does.

    Parameters
    ----------
    v, v_other : torch.Tensor
        [num_tokens, num_heads, head_dim], any strides; `v` is read and written. `v` may be float32
        beside a `v_other` of 16 bits.
    s, s_other : torch.Tensor
        [num_tokens, num_heads], float32 (float64 for float64 outputs), logarithm to base 2, any
        strides; `s` is read and written.
    mask : torch.Tensor, optional
        Bools [num_tokens]: which tokens are merged; the others keep their state. None: all.

    Raises
    ------
    TypeError, ValueError, UnavailableError, RuntimeError
        As for `merge_attn_states.update_state`, by the names of this function's arguments.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states.integrations import flashinfer
    >>> v, s = torch.zeros(2, 8, 64), torch.zeros(2, 8)
    >>> mask = torch.tensor([True, False])
    >>> flashinfer.merge_state_in_place(v, s, torch.ones(2, 8, 64), torch.zeros(2, 8), mask)
    >>> v[:, 0, 0].tolist(), s[:, 0].tolist()
    ([0.5, 0.0], [1.0, 0.0])
    """
    merged = None if mask is None else _of_rows(mask, v)
    try:
        if merged is None:
            states.update_state(v, s, v_other, s_other, lse_base="2")
        else:
            states.merge_block(v, s, v_other, s_other, None, merged, "2", invert_empty=True)
    except (TypeError, ValueError) as error:
        raise renamed(error, _IN_PLACE) from None


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge a stack of attention states, as `flashinfer.merge_states` does.

    Parameters
    ----------
    v : torch.Tensor
        [num_tokens, num_states, num_heads, head_dim], any strides. 1 to 1,024 states.
    s : torch.Tensor
        [num_tokens, num_states, num_heads], float32 (float64 for float64 outputs), logarithm to
        base 2, any strides.

    Returns
    -------
    tuple of torch.Tensor
        v [num_tokens, num_heads, head_dim], and s [num_tokens, num_heads] to base 2.

    Raises
    ------
    TypeError, ValueError, UnavailableError, RuntimeError
        As for `merge_attn_states.merge_states`, by the names of this function's arguments.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states.integrations import flashinfer
    >>> v, s = flashinfer.merge_states(torch.ones(4, 16, 8, 64), torch.zeros(4, 16, 8))
    >>> v.shape, s[0, 0]
    (torch.Size([4, 8, 64]), tensor(4.))
    """
    try:
        merged, merged_s = states.merge_states(v, s, dim=1, lse_base="2")
    except (TypeError, ValueError) as error:
        raise renamed(error, _STACK) from None
    assert merged_s is not None
    return merged, merged_s


def _of_rows(mask: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The mask of tokens as one of rows [num_tokens, num_heads], without a copy."""
    for name, operand in {"v": v, "mask": mask}.items():
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(operand).__name__}")
    if v.dim() != 3 or mask.shape != v.shape[:1]:
        raise ValueError(
            "mask: expected [num_tokens] of v [num_tokens, num_heads, head_dim], got "
            f"{list(mask.shape)} beside {list(v.shape)}"
        )
    return mask[:, None].expand(v.shape[:2])
