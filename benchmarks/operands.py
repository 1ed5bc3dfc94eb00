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
    with device:
        parts = [_rows(case, case.input_dtype, sets, is_part=True) for _ in range(2)]
        outputs = _rows(case, case.output_dtype, sets, is_part=False)
        lses = [_lses(case, sets) for _ in range(3)]
        scale = torch.tensor(0.5) if case.has_narrow_output else None
        if case.kind == "half empty":
            rows = torch.arange(case.tokens * case.heads).view(case.heads, case.tokens)
            empty = rows // min(EMPTY_BLOCK, case.tokens // 2) % 2 == 1
            lses[0].masked_fill_(empty, -torch.inf)
    count = case.context_tokens if case.context_tokens < case.tokens else None
    made = []
    for output, prefix, suffix, *lse in zip(outputs, *parts, *lses, strict=True):
        one = Operands(output, prefix, lse[0], suffix, lse[1], lse[2], count, scale)
        if case.kind == "onto prefix":
            one = one._replace(output=prefix, output_lse=lse[0])
        elif case.kind.endswith("onto suffix"):
            one = one._replace(output=suffix)
            if "output onto" not in case.kind:
                one = one._replace(output_lse=lse[1])
        made.append(one)
    return made


def _rows(case: Case, dtype: torch.dtype, sets: int, is_part: bool) -> torch.Tensor:
    """[sets, N, H, D] in one memory: thousands of small allocations would take seconds."""
    n, h, d = case.tokens, case.heads, case.head_size

    def random(*shape: int) -> torch.Tensor:
        drawn = torch.bfloat16 if dtype.itemsize == 1 else dtype  # PyTorch draws no FP8
        return torch.randn(shape, dtype=drawn).to(dtype)

    if case.kind == "heads first":
        return random(sets, h, n, d).transpose(1, 2)
    if case.kind == "8-byte aligned":
        shift = 8 // dtype.itemsize
        return random(sets, n * h * d + 2 * shift)[:, shift:-shift].view(sets, n, h, d)
    width = d * 3 // 2 if is_part and case.kind == "padded heads" else d
    return random(sets, n, h, width)[..., :d]


def _lses(case: Case, sets: int) -> torch.Tensor:
    """[sets, H, N]."""
    n, h = case.tokens, case.heads
    if case.kind == "tokens-first LSE":
        return (3 * torch.randn(sets, n, h)).transpose(1, 2)
    padding = LSE_PADDING if case.kind == "row-strided LSE" else 0
    return (3 * torch.randn(sets, h, n + padding))[..., :n]
