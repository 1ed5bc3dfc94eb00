"""The tensors of a case, in as many sets as it takes to rotate through."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .cases import Case

PADDING = 64  # elements behind each head in "padded heads": 192 wide, 128 used
EMPTY_BLOCK = 256  # tokens


class Operands(NamedTuple):
    """The arguments of the op, by its names and in its order."""

    output: torch.Tensor
    prefix_output: torch.Tensor
    prefix_lse: torch.Tensor
    suffix_output: torch.Tensor
    suffix_lse: torch.Tensor
    output_lse: torch.Tensor
    prefill_tokens_with_context: int | None = None
    output_scale: torch.Tensor | None = None


def make_operands(case: Case, sets: int, device: torch.device) -> list[Operands]:
    """Random sets of a comparison's first case."""
    n, h, d = case.tokens, case.heads, case.head_size
    inputs, output = case.torch_dtype, case.torch_output_dtype

    def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        if dtype.itemsize == 1:  # PyTorch draws no FP8
            return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
        return torch.randn(shape, device=device, dtype=dtype)

    def rows(dtype: torch.dtype, padding: int = 0) -> list[torch.Tensor]:
        """One memory for all sets: thousands of small allocations would take seconds."""
        if case.layout == "heads first":
            return list(random(dtype, sets, h, n, d).transpose(1, 2))
        if case.layout == "8-byte aligned":
            shift = 8 // dtype.itemsize
            flat = random(dtype, sets, n * h * d + 2 * shift)
            return [one[shift:-shift].view(n, h, d) for one in flat]
        return list(random(dtype, sets, n, h, d + padding)[..., :d])

    def lses(first_empty: int | None) -> list[torch.Tensor]:
        values = 3 * torch.randn(sets, h, n, device=device)
        if first_empty is not None:  # a few empty rows, never in both parts
            values.view(sets, -1)[:, first_empty :: max(7, h * n // 8)] = -torch.inf
        return list(values)

    # As an MLA engine has them: the parts padded to the key's width, the output dense.
    padding = PADDING if case.layout == "padded heads" else 0
    scale = torch.tensor(0.5, device=device) if case.output_dtype else None
    parts = (rows(inputs, padding), lses(1), rows(inputs, padding), lses(2))
    every = zip(rows(output), *parts, lses(None), strict=True)
    return [Operands(*tensors)._replace(output_scale=scale) for tensors in every]


def vary(operands: Operands, case: Case) -> Operands:
    """The same memory as another case of the comparison uses it."""
    changed = operands._replace(prefill_tokens_with_context=case.context_tokens)
    if case.in_place:
        changed = changed._replace(output=operands.suffix_output)
        if not case.lse_elsewhere:
            changed = changed._replace(output_lse=operands.suffix_lse)
    if case.empty_blocks:
        block = min(EMPTY_BLOCK, max(1, case.tokens // 2))
        tokens = torch.arange(case.tokens, device=operands.prefix_lse.device)
        empty = (tokens // block % 2 == 1) & ~operands.suffix_lse.isinf()
        changed = changed._replace(prefix_lse=operands.prefix_lse.masked_fill(empty, -torch.inf))
    return changed
