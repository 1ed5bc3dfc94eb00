"""Split attention by itself: what it merges, and what it leaves as it was."""

import pytest
import torch
from attention_support import operands, reference
from support import BF16, F32, F64

from merge_attn_states.integrations._split_attention import split_attention
from merge_attn_states.integrations.pytorch import attention_with_lse


def remembering():
    """An `attend` that computes a part once, and what it remembers."""
    states = {}

    def attend(query, key, value, mask=None, **options):
        part = query.storage_offset(), query.shape[2], key.storage_offset(), key.shape[2]
        if part not in states:
            states[part] = attention_with_lse(query, key, value, mask, **options)
        return states[part]

    return attend, states


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 4])  # no merge; one; a chain, in float32
@pytest.mark.parametrize("batch", [1, 2])
def test_a_remembered_state_is_only_read(batch, parts, dtype, is_causal, device):
    given = operands((batch, 4, 2, 8, 8, 16, 16), dtype, device)
    attend, states = remembering()
    options = {"parts": parts, "is_causal": is_causal, "attend": attend}
    first = split_attention(*given, **options)
    kept = [x.clone() for state in states.values() for x in state]
    due = [x.clone() for x in first]
    for result in first:
        result.fill_(7)  # what a caller does to its result is no matter either
    second = split_attention(*given, **options)
    assert all(torch.equal(*pair) for pair in zip(second, due, strict=True))
    remembered = [x for state in states.values() for x in state]
    assert all(torch.equal(*pair) for pair in zip(remembered, kept, strict=True))


def test_a_long_chain_is_rounded_once(device):
    """64 parts in bfloat16: no worse than one pass."""
    query, key, value = operands((1, 4, 4, 16, 256, 64, 64), BF16, device)
    expected, _ = reference(query, key, value)
    errors = []
    for parts in (1, 64):
        output, _ = split_attention(query, key, value, parts=parts)
        errors.append((output.cpu().to(F64) - expected[0].transpose(0, 1)).abs().max())
    assert errors[1] <= 1.5 * errors[0], errors


def test_split_attention_is_causal_on_squares_alone():
    query, key, value = operands((1, 2, 2, 3, 5, 8, 8), F32, "cpu")
    with pytest.raises(ValueError, match=r"^is_causal: .* got 3 queries, 5 keys$"):
        split_attention(query, key, value, is_causal=True)
