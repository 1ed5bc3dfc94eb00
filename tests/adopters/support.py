"""The comparisons with an adopter's own merge, and blocks as a ring's attention gives them."""

import torch
from support import F32, F64

from merge_attn_states.reference import merge_states_reference

State = tuple[torch.Tensor, torch.Tensor]  # output and LSE


def blocks(count: int, dtype, *, spread=2.0, by_head=False) -> list[State]:
    """As FlashAttention gives them: [B, S, H, D] and [B, H, S]; by head, [B, H, S, D]."""
    batch, tokens, heads, size = 2, 16, 5, 32  # each another number, so that no mix-up fits
    shape = (batch, heads, tokens, size) if by_head else (batch, tokens, heads, size)
    return [
        (torch.randn(shape).to(dtype), 3 + spread * torch.randn(batch, heads, tokens))
        for _ in range(count)
    ]


def exact(parts: list[State], **options) -> State:
    """The merge in float64, of parts whose LSEs have the layout of their outputs."""
    return merge_states_reference([o for o, _ in parts], [x for _, x in parts], **options)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.to(F64).reshape(expected.shape) - expected).pow(2).mean().sqrt())


def assert_replaces(ours: State, theirs: State, expected: State) -> None:
    """Ours has theirs' shape and dtype, is equal within it, and lies no further from float64.

    Further means by more than half a unit in float32's last place, by which two orders of the same
    operations differ.
    """
    for one, other, exactly in zip(ours, theirs, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        size = float(exactly.pow(2).mean().sqrt())
        assert _error(other, exactly) < 8 * torch.finfo(other.dtype).eps * size, "theirs is another"
        allowed = _error(other, exactly) + torch.finfo(F32).eps / 2 * size
        assert _error(one, exactly) <= allowed
