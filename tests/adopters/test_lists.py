"""Parts at once: one line, `merge_states`, in the place of a chain or of a stack."""

import pytest
import torch
from support import BF16, F16, F32, INF

from merge_attn_states import merge_states

from .support import assert_replaces, blocks, exact


@pytest.fixture
def merge_attentions(adopter):
    return adopter("natten", "natten.functional").merge_attentions


def by_token(parts):
    return [(output, lse.transpose(1, 2).contiguous()) for output, lse in parts]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_natten(merge_attentions, dtype, count):
    parts = by_token(blocks(count, dtype))
    outputs, lses = map(list, zip(*parts, strict=True))
    theirs = merge_attentions(outputs, lses, torch_compile=False)
    assert_replaces(merge_states(outputs, lses), theirs, exact(parts))


def test_natten_where_no_part_saw_a_key(merge_attentions):
    parts = by_token(blocks(2, F32))
    for _, lse in parts:
        lse[:, 0] = -INF
    outputs, lses = map(list, zip(*parts, strict=True))
    theirs, _ = merge_attentions(outputs, lses, torch_compile=False)
    out, lse = merge_states(outputs, lses)
    assert theirs[:, 0].isnan().all()
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -INF).all()


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dual_chunk_attention(dtype, stage):
    """By its formula: intra, succ and inter attention, weighed by a softmax over their LSEs.

    A chunk of the prefill has outputs [T, H, D] and LSEs [1, H, T]; the decode has [B, 1, H, D] and
    [B, H, 1]. Theirs weighs in the outputs' dtype.
    """
    tokens, heads, size = 16, 5, 32
    shape = (tokens, heads, size) if stage == "prefill" else (tokens, 1, heads, size)
    of_lse = (1, heads, tokens) if stage == "prefill" else (tokens, heads, 1)
    outputs = [torch.randn(shape).to(dtype) for _ in range(3)]
    lses = [3 + 2 * torch.randn(of_lse) for _ in range(3)]
    views = [lse[0].T if stage == "prefill" else lse.transpose(1, 2) for lse in lses]

    weights = torch.stack(views).softmax(0)[..., None]
    weighed = (torch.stack(outputs) * weights.to(dtype)).sum(0)
    out, lse = merge_states(outputs, views)
    theirs = weighed, torch.stack(views).logsumexp(0)
    assert_replaces((out, lse), theirs, exact(list(zip(outputs, views, strict=True))))
