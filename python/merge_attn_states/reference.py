"""The reference that every kernel is compared with: plain PyTorch, float64 inside.

It is written for reading, not for speed, one rule after the other: the weights of section 2.2 of
arXiv 2501.01005, parts that saw no keys, tokens past the context count, FP8 outputs. Tests and
benchmarks import it; nothing else in the package does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["merge_attn_states_reference", "merge_states_reference", "saturate"]

_NATURAL = {"e": 1.0, "2": math.log(2)}  # what a log-sum-exp of that base is times


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


def merge_states_reference(
    outputs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    *,
    index: Sequence[torch.Tensor | None] | None = None,
    empty: Sequence[torch.Tensor | None] | None = None,
    sink: torch.Tensor | None = None,
    lse_base: str | Sequence[str] = "e",
    out_lse_base: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of attention states in float64; differentiable.

    Parameters
    ----------
    outputs : sequence of torch.Tensor
        Each [*rows, D], any floating dtype.
    lses : sequence of torch.Tensor
        Each [*rows] or [*rows, 1], in `lse_base`. -inf and +inf both mean that the part saw no
        keys there.
    index : sequence of torch.Tensor or None, optional
        For each part None or integers [N]: the part's row for each of the N rows of the result
        along the first dimension; the part is absent from a row whose number is none of its own.
    empty : sequence of torch.Tensor or None, optional
        For each part None or bools of its LSE's shape: where it saw no keys, whatever its LSE says.
    sink : torch.Tensor, optional
        [H], H the last row dimension: a logit in the result's base that has weight and no values.
        -inf and +inf mean none.
    lse_base : "e", "2" or a sequence of them
        Of all parts or of each.
    out_lse_base : "e" or "2", optional
        Of the result. None: that of the parts, which is then one.

    Returns
    -------
    tuple of torch.Tensor
        Output [*rows, D] and LSE [*rows], both float64.
    """
    bases = [lse_base] * len(outputs) if isinstance(lse_base, str) else list(lse_base)
    if out_lse_base is None:
        (out_lse_base,) = set(bases)
    parts = [
        _rows_of_part(*part)
        for part in zip(
            outputs,
            lses,
            index or [None] * len(outputs),
            empty or [None] * len(outputs),
            strict=True,
        )
    ]
    values, raw, absent = (torch.stack(each) for each in zip(*parts, strict=True))

    # In the base of all, so that a difference of large LSEs is exact; natural where they differ.
    one_base = _NATURAL[bases[0]] if len(set(bases)) == 1 else 1.0
    of_result = _NATURAL[out_lse_base] / one_base
    lse = raw * raw.new_tensor([_NATURAL[base] / one_base for base in bases]).reshape(
        -1, *[1] * (raw.dim() - 1)
    )
    # A sink is a part without values.
    logit = torch.full_like(lse[0], -torch.inf)
    if sink is not None:
        logit = (sink.to(torch.float64) * of_result).expand_as(logit)
    no_sink = logit.isinf()

    # A NaN stays visible; amax, maximum and exp carry it through. Values and LSEs that must not
    # count are replaced before they are computed with, so that they have no gradient either.
    lse = lse.masked_fill(absent, 0.0)
    largest = torch.maximum(
        lse.masked_fill(absent, -torch.inf).amax(0), logit.masked_fill(no_sink, -torch.inf)
    ).detach()
    nobody = absent.all(0) & no_sink
    pivot = largest.masked_fill(nobody, 0.0)
    weights = ((lse - pivot) * one_base).exp().masked_fill(absent, 0.0)
    of_sink = (logit.masked_fill(no_sink, 0.0) - pivot) * one_base
    of_sink = of_sink.exp().masked_fill(no_sink, 0.0)
    total = (weights.sum(0) + of_sink).masked_fill(nobody, 1.0)
    kept = values.masked_fill(absent[..., None], 0.0)
    output = ((weights / total)[..., None] * kept).sum(0)
    merged = ((pivot + total.log() / one_base) / of_result).masked_fill(nobody, -torch.inf)

    # One part alone: its row as it is, unless its lse is NaN, which gave NaN above.
    alone = ((~absent).sum(0) == 1) & no_sink & ~merged.isnan()
    which = (~absent).to(torch.int64).argmax(0, keepdim=True)
    output = torch.where(
        alone[..., None], values.take_along_dim(which[..., None], 0).squeeze(0), output
    )
    if set(bases) == {out_lse_base}:
        merged = torch.where(alone, raw.take_along_dim(which, 0).squeeze(0), merged)
    return output, merged


def _rows_of_part(
    output: torch.Tensor,
    lse: torch.Tensor,
    index: torch.Tensor | None,
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a part's values, LSEs and where it is absent, for each row of the result."""
    values = output.to(torch.float64)
    lse = lse.to(torch.float64).reshape(values.shape[:-1])
    absent = lse.isinf()
    if empty is not None:
        absent = absent | empty.reshape(lse.shape)
    if index is None:
        return values, lse, absent
    # One more row, which is absent: there is where every other number leads.
    rows = torch.where((index >= 0) & (index < len(values)), index, len(values)).to(torch.int64)

    def gathered(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_ones(1, *x.shape[1:])])[rows]

    return gathered(values), gathered(lse), gathered(absent)


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
    output, merged = merge_states_reference(
        (prefix_output, suffix_output), (prefix_lse.T, suffix_lse.T)
    )
    lse = merged.T
    # From the count on, output and LSE are the suffix's as they are, an LSE of +inf included.
    if (count := prefill_tokens_with_context) is not None:
        output[count:] = suffix_output[count:].to(torch.float64)
        lse[:, count:] = suffix_lse[:, count:].to(torch.float64)
    if output_scale is not None:
        output = output / output_scale.to(torch.float64).reshape(())
    return output, lse
