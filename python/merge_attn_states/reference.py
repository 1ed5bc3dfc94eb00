"""The reference that every kernel is compared with: plain PyTorch, float64 inside.

It is written for reading, not for speed, one rule after the other: the weights of section 2.2 of
arXiv 2501.01005, parts that saw no keys, tokens past the context count, FP8 outputs. Tests and
benchmarks import it; nothing else in the package does.
"""

from __future__ import annotations

import torch

__all__ = ["merge_attn_states_reference", "saturate"]

_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def saturate(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round `values` to an FP8 `dtype`, clamping to its largest finite value; NaN stays NaN.

    PyTorch converts float64 to FP8 through float32, which rounds twice. So the nearest of the
    dtype's codes is looked up here; of two that are equally near, it is the even one.

    Parameters
    ----------
    values : torch.Tensor
        Any shape; taken as float64.
    dtype : torch.dtype
        torch.float8_e4m3fn or torch.float8_e5m2.

    Returns
    -------
    torch.Tensor
        `values` in `dtype`.
    """
    limit = torch.finfo(dtype).max
    codes = torch.arange(0, 128, dtype=torch.uint8, device=values.device)
    grid = codes.view(dtype).to(torch.float64)
    grid = grid[grid.isfinite() & (grid <= limit)]  # ascending magnitudes; index = code
    magnitude = values.to(torch.float64).abs().clamp(max=limit)
    above = torch.searchsorted(grid, magnitude.nan_to_num(0.0)).clamp(max=grid.numel() - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = grid[above] - magnitude, magnitude - grid[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = torch.where(take_below, below, above).to(torch.uint8)
    code = torch.where(values.signbit(), code | 0x80, code)
    return torch.where(values.isnan(), torch.full_like(code, 0x7F), code).view(dtype)


def merge_attn_states_reference(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    prefill_tokens_with_context: int | None = None,
    output_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states in float64.

    Parameters
    ----------
    prefix_output, suffix_output : torch.Tensor
        [num_tokens, num_heads, head_size], any floating dtype.
    prefix_lse, suffix_lse : torch.Tensor
        [num_heads, num_tokens], natural log. -inf and +inf both mean that the part saw no keys.
    prefill_tokens_with_context : int, optional
        Tokens from this one on take the suffix as it is. None means all tokens are merged.
    output_scale : torch.Tensor, optional
        One element; the output is divided by it.

    Returns
    -------
    tuple of torch.Tensor
        Output [num_tokens, num_heads, head_size] and LSE [num_heads, num_tokens], both float64 and
        not yet rounded to the output's dtype (see `saturate` for FP8).
    """
    num_tokens = prefix_output.shape[0]
    count = num_tokens if prefill_tokens_with_context is None else prefill_tokens_with_context
    prefix, suffix = prefix_output.to(torch.float64), suffix_output.to(torch.float64)
    lse_p, lse_s = prefix_lse.to(torch.float64), suffix_lse.to(torch.float64)

    empty_p, empty_s = lse_p.isinf(), lse_s.isinf()
    minus_inf = torch.full_like(lse_p, -torch.inf)
    lse_p, lse_s = torch.where(empty_p, minus_inf, lse_p), torch.where(empty_s, minus_inf, lse_s)

    # A NaN lse stays visible; torch.maximum and exp carry it through.
    largest = torch.maximum(lse_p, lse_s)
    both_empty = empty_p & empty_s
    pivot = torch.where(both_empty, torch.zeros_like(largest), largest)
    weight_p, weight_s = (lse_p - pivot).exp(), (lse_s - pivot).exp()
    total = weight_p + weight_s
    lse = pivot + total.log()  # both empty: 0 + log(0) = -inf

    def rows(x: torch.Tensor) -> torch.Tensor:  # [H, N] -> [N, H, 1]
        return x.T.unsqueeze(-1)

    def part(weight: torch.Tensor, values: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        # An empty part's values are never used: they may be NaN, and 0 * NaN is NaN.
        return torch.where(rows(empty), torch.zeros_like(values), rows(weight / total) * values)

    output = part(weight_p, prefix, empty_p) + part(weight_s, suffix, empty_s)
    # One part empty: the other's row as it is, unless its lse is NaN, which gave NaN above.
    copy_s = rows(empty_p & ~empty_s & ~lse_s.isnan())
    copy_p = rows(empty_s & ~empty_p & ~lse_p.isnan())
    output = torch.where(copy_s, suffix, torch.where(copy_p, prefix, output))

    # From the count on, output and LSE are the suffix's as they are, an LSE of +inf included.
    output[count:] = suffix[count:]
    lse[:, count:] = suffix_lse.to(torch.float64)[:, count:]
    if output_scale is not None:
        output = output / output_scale.to(torch.float64).reshape(())
    return output, lse
