"""The tensors of a case, in as many sets as it takes to rotate through."""

from typing import NamedTuple

import torch

from .cases import Case

LSE_PADDING = 64  # of "row-strided LSE", in floats
EMPTY_BLOCK = 256


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
    """Random operands, a tuple a set; where there is one set, every tensor has its own storage."""
    parts = [_rows(case, case.input_dtype, True, sets, device) for _ in range(2)]
    outputs = _rows(case, case.output_dtype, False, sets, device)
    lses = [_lses(case, sets, device) for _ in range(3)]
    if case.kind == "half empty":
        flat = torch.arange(case.tokens * case.heads, device=device)
        empty = (flat // min(EMPTY_BLOCK, case.tokens // 2) % 2 == 1).view(case.heads, -1)
        lses[0].masked_fill_(empty, -torch.inf)
    made = []
    for i in range(sets):
        prefix, suffix, output = parts[0][i], parts[1][i], outputs[i]
        prefix_lse, suffix_lse, output_lse = (lse[i] for lse in lses)
        if case.kind == "onto prefix":
            output, output_lse = prefix, prefix_lse
        elif case.kind in ("onto suffix", "half context, onto suffix"):
            output, output_lse = suffix, suffix_lse
        elif case.kind == "half context, output onto suffix":
            output = suffix
        made.append(
            Operands(
                *(output, prefix, prefix_lse, suffix, suffix_lse, output_lse),
                case.context_tokens if case.context_tokens < case.tokens else None,
                torch.tensor(0.5, device=device) if case.has_narrow_output else None,
            )
        )
    return made


def _rows(
    case: Case, dtype: torch.dtype, is_part: bool, sets: int, device: torch.device
) -> torch.Tensor:
    """[sets, N, H, D] in one memory: thousands of small allocations would take seconds."""
    n, h, d = case.tokens, case.heads, case.head_size
    if case.kind == "heads first":
        return random(dtype, device, sets, h, n, d).transpose(1, 2)
    if case.kind == "8-byte aligned":
        shift = 8 // dtype.itemsize
        flat = random(dtype, device, sets, n * h * d + 2 * shift)
        return flat[:, shift:-shift].view(sets, n, h, d)
    width = d * 3 // 2 if is_part and case.kind == "padded heads" else d
    return random(dtype, device, sets, n, h, width)[..., :d]


def _lses(case: Case, sets: int, device: torch.device) -> torch.Tensor:
    """[sets, H, N]."""
    n, h = case.tokens, case.heads
    if case.kind == "row-strided LSE":
        return 3 * torch.randn(sets, h, n + LSE_PADDING, device=device)[..., :n]
    if case.kind == "tokens-first LSE":
        return 3 * torch.randn(sets, n, h, device=device).transpose(1, 2)
    return 3 * torch.randn(sets, h, n, device=device)


def random(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    if dtype.itemsize == 1:  # PyTorch draws no FP8
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
    return torch.randn(shape, device=device, dtype=dtype)
