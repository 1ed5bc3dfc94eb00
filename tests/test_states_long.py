"""128k keys in 64 parts: one merge, a running state, and any grouping are one attention."""

import math

import pytest
import torch
from support import BF16, F32, F64, INF

from merge_attn_states import merge_states, update_state

TOKENS, HEADS, SIZE, KEYS, PARTS = 3, 2, 64, 2**17, 64


@pytest.fixture(scope="module", params=[0.0, 400.0], ids=["scores around 0", "scores around 400"])
def attention(request):
    """Outputs and LSEs of 64 parts in float64, and of all keys at once."""
    random = torch.Generator().manual_seed(1)
    query = torch.randn(HEADS, TOKENS, SIZE, generator=random, dtype=F64)
    key = torch.randn(HEADS, KEYS, SIZE, generator=random, dtype=F64)
    value = torch.randn(HEADS, KEYS, SIZE, generator=random, dtype=F64)
    scores = query @ key.transpose(1, 2) / math.sqrt(SIZE) + request.param

    def attend(first, last):
        of_part = scores[..., first:last]
        output = of_part.softmax(-1) @ value[:, first:last]
        return output.transpose(0, 1), of_part.logsumexp(-1).T  # [tokens, heads, size]

    step = KEYS // PARTS
    parts = [attend(step * k, step * (k + 1)) for k in range(PARTS)]
    return [o for o, _ in parts], [x for _, x in parts], attend(0, KEYS)


def assert_one_attention(merged, whole, outputs, eps):
    (out, lse), (expected, expected_lse) = merged, whole
    largest = torch.stack(outputs).abs().amax(0)
    assert ((out.cpu().to(F64) - expected).abs() <= eps * largest).all()
    assert ((lse.cpu().to(F64) - expected_lse).abs() <= 4 * 2.0**-23 * expected_lse.abs()).all()


def test_in_one_merge(attention, device):
    outputs, lses, whole = attention
    narrow = [x.to(device, F32) for x in outputs], [x.to(device, F32) for x in lses]
    # The parts' own LSEs are rounded too: by half an ulp of the largest.
    rounded = 2.0**-24 * max(float(x.abs().max()) for x in lses)
    assert_one_attention(merge_states(*narrow), whole, outputs, 8 * 2.0**-23 + 2 * rounded)


def test_in_a_running_state_of_narrow_blocks(attention, device):
    outputs, lses, whole = attention
    state = torch.full((TOKENS, HEADS, SIZE), math.nan, device=device)
    state_lse = torch.full((TOKENS, HEADS), -INF, device=device)
    for output, lse in zip(outputs, lses, strict=True):
        update_state(state, state_lse, output.to(device, BF16), lse.to(device, F32))
    # A block is rounded to bfloat16 once; 64 steps of float32 add nothing that counts beside it.
    rounded = 2.0**-24 * max(float(x.abs().max()) for x in lses)
    eps = 2.0**-9 + PARTS * (2.0**-23 + rounded)
    (expected, expected_lse) = whole
    largest = torch.stack(outputs).abs().amax(0)
    assert ((state.cpu().to(F64) - expected).abs() <= eps * largest).all()
    assert ((state_lse.cpu().to(F64) - expected_lse).abs() <= PARTS * 2.0**-24 * expected_lse).all()


@pytest.mark.parametrize("fan_in", [2, 3, 8])
def test_in_a_tree(fan_in, attention, device):
    outputs, lses, whole = attention
    states = [(o.to(device), x.to(device)) for o, x in zip(outputs, lses, strict=True)]  # float64
    while len(states) > 1:
        groups = [states[i : i + fan_in] for i in range(0, len(states), fan_in)]
        states = [merge_states([o for o, _ in g], [x for _, x in g]) for g in groups]
    (out, lse) = states[0]
    torch.testing.assert_close(out.cpu(), whole[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse.cpu(), whole[1], rtol=1e-13, atol=1e-13)
