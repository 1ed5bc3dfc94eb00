"""The reference of many parts against attention in one pass, and its derivatives.

Everything else is compared with the reference, so here it is compared with what it stands for.
"""

import math
from functools import reduce
from itertools import product

import pytest
import torch
from support import F64

from merge_attn_states.reference import merge_attn_states_reference, merge_states_reference

LN = {"e": 1.0, "2": math.log(2)}
QUERIES, HEADS, HEAD_SIZE = 5, 3, 4
CHUNKS = (4, 1, 0, 7, 2)  # keys of each part; one part has none


def attention(scores, value):
    """[.., Q, K] scores: normalised output [.., Q, D] and LSE [.., Q]; zeros and -inf of no key."""
    return scores.softmax(-1).nan_to_num() @ value, scores.logsumexp(-1)


def parts_of(scores, value, base="e"):
    """Outputs [Q, H, D] and LSEs [Q, H]: the query axis of `attention` has one entry."""
    outputs, lses = [], []
    for part, of_values in zip(scores.split(CHUNKS, -1), value.split(CHUNKS, -2), strict=True):
        output, lse = attention(part, of_values)
        outputs.append(output.squeeze(-2))
        lses.append(lse.squeeze(-1) / LN[base])
    return outputs, lses


def scores_and_values(spread=30.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    # Rows are [Q, H]: the last row dimension is the heads'.
    return (
        spread * draw(QUERIES, HEADS, 1, sum(CHUNKS)),
        draw(QUERIES, HEADS, sum(CHUNKS), HEAD_SIZE),
    )


def assert_same(actual, expected):
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("unit", [False, True], ids=["", "trailing-1"])
def test_parts_are_one_attention(base, unit):
    scores, value = scores_and_values()
    output, lse = attention(scores, value)
    outputs, lses = parts_of(scores, value, base)
    lses = [x[..., None] if unit else x for x in lses]
    merged = merge_states_reference(outputs, lses, lse_base=base)
    assert_same(merged, (output.squeeze(-2), lse.squeeze(-1) / LN[base]))


def test_bases_may_be_mixed():
    scores, value = scores_and_values()
    outputs, lses = parts_of(scores, value)
    bases = ["2", "e", "2", "e", "e"]
    mixed = [lse / LN[base] for lse, base in zip(lses, bases, strict=True)]
    expected, expected_lse = merge_states_reference(outputs, lses)
    merged = merge_states_reference(outputs, mixed, lse_base=bases, out_lse_base="2")
    assert_same(merged, (expected, expected_lse / LN["2"]))
    with pytest.raises(ValueError, match="unpack"):  # of what base the result is must be said
        merge_states_reference(outputs, mixed, lse_base=bases)


def test_any_grouping_gives_the_same():
    outputs, lses = parts_of(*scores_and_values())

    def merge(*states):
        return merge_states_reference([s[0] for s in states], [s[1] for s in states])

    a, b, c, d, e = zip(outputs, lses, strict=True)
    expected = merge(a, b, c, d, e)
    assert_same(reduce(merge, (b, c, d, e), a), expected)
    assert_same(merge(merge(a, b), merge(c, merge(d, e))), expected)


def test_two_parts_are_the_pair():
    outputs, lses = parts_of(*scores_and_values())
    expected = merge_attn_states_reference(outputs[0], lses[0].T, outputs[3], lses[3].T)
    output, lse = merge_states_reference(outputs[::3], lses[::3])
    assert_same((output, lse.T), expected)


@pytest.mark.parametrize("base", ["e", "2"])
def test_a_sink_is_one_more_key_without_a_value(base):
    scores, value = scores_and_values(spread=1.0)
    sink = torch.tensor([0.5, -torch.inf, 3.0], dtype=F64)  # of each head; the second has none
    outputs, lses = parts_of(scores, value, base)
    logit = (sink * LN[base])[:, None, None].expand(QUERIES, HEADS, 1, 1)
    key = torch.zeros(QUERIES, HEADS, 1, HEAD_SIZE, dtype=F64)
    output, lse = attention(torch.cat([scores, logit], -1), torch.cat([value, key], -2))
    merged = merge_states_reference(outputs, lses, sink=sink, lse_base=base)
    assert_same(merged, (output.squeeze(-2), lse.squeeze(-1) / LN[base]))


def test_a_sink_beside_nothing():
    nothing = torch.full((2, 3), -torch.inf, dtype=F64)
    values = torch.full((2, 3, 4), torch.nan, dtype=F64)
    sink = torch.tensor([0.5, -torch.inf, torch.inf], dtype=F64)
    output, lse = merge_states_reference([values], [nothing], sink=sink)
    assert (output == 0).all()
    assert_same([lse], [torch.tensor([0.5, -torch.inf, -torch.inf], dtype=F64).expand(2, 3)])


def test_rows_declared_empty_are_left_out_whatever_they_hold():
    scores, value = scores_and_values()
    outputs, lses = parts_of(scores, value)
    empty = torch.rand(QUERIES, HEADS, generator=torch.Generator().manual_seed(1)) < 0.5
    lies = torch.where(empty, 0.0, lses[3])  # a kernel's LSE of an empty row is often 0
    lies[0, 0] = torch.where(empty[0, 0], torch.nan, lies[0, 0])
    garbage = outputs[3].masked_fill(empty[..., None], torch.nan)
    truth = [*lses[:3], lses[3].masked_fill(empty, -torch.inf), lses[4]]
    expected = merge_states_reference(outputs, truth)
    merged = merge_states_reference(
        [*outputs[:3], garbage, outputs[4]],
        [*lses[:3], lies, lses[4]],
        empty=[None, None, None, empty, None],
    )
    assert_same(merged, expected)


def test_an_index_says_which_row_of_a_part():
    outputs, lses = parts_of(*scores_and_values())
    index = torch.tensor([4, -1, 0, 0, 99])
    seen = (index >= 0) & (index < QUERIES)
    moved = outputs[1][index.clamp(0, QUERIES - 1)]
    moved_lse = lses[1][index.clamp(0, QUERIES - 1)].masked_fill(~seen[:, None], -torch.inf)
    expected = merge_states_reference([outputs[0], moved], [lses[0], moved_lse])
    merged = merge_states_reference(outputs[:2], lses[:2], index=[None, index])
    assert_same(merged, expected)
    nothing = [outputs[0], outputs[1][:0]], [lses[0], lses[1][:0]]
    assert_same(
        merge_states_reference(*nothing, index=[None, index]),
        (outputs[0], lses[0]),
    )


def test_one_part_alone_is_itself():
    value = torch.tensor([[-0.0, torch.inf, torch.nan]], dtype=F64)
    lse = torch.tensor([0.1], dtype=F64)
    nothing = torch.full_like(value, torch.nan), torch.full_like(lse, torch.inf)
    output, merged = merge_states_reference([nothing[0], value], [nothing[1], lse], lse_base="2")
    assert torch.equal(output.signbit(), value.signbit())
    assert_same((output, merged), (value, lse))
    output, merged = merge_states_reference([value], [torch.full_like(lse, torch.nan)])
    assert output.isnan().all()
    assert merged.isnan().all()


def test_a_nan_lse_is_its_own_rows():
    outputs, lses = parts_of(*scores_and_values())
    expected, expected_lse = merge_states_reference(outputs, lses)
    lses[1][2, 1] = torch.nan
    output, lse = merge_states_reference(outputs, lses)
    expected[2, 1], expected_lse[2, 1] = torch.nan, torch.nan
    assert_same((output, lse), (expected, expected_lse))


@pytest.mark.parametrize("kind", ["plain", "base 2", "mixed", "empty", "index", "sink", "alone"])
def test_derivatives(kind):
    """By finite differences; whatever has no weight has a derivative of exactly 0, not NaN."""
    scores, value = scores_and_values(spread=1.0)
    outputs, lses = parts_of(scores, value, "2" if kind == "base 2" else "e")
    outputs, lses = [outputs[0], outputs[3]], [lses[0], lses[3]]
    for lse in lses:
        lse[1, 1] = -torch.inf  # a row that nobody saw
    lses[1][2, 2] = torch.inf
    options = {
        "base 2": {"lse_base": "2"},
        "mixed": {"lse_base": ["e", "2"], "out_lse_base": "e"},
        "empty": {"empty": [None, torch.eye(QUERIES, HEADS, dtype=torch.bool)]},
        "index": {"index": [torch.tensor([1, 1, -1, 0, 4]), None]},
    }.get(kind, {})
    if kind == "alone":
        outputs, lses = outputs[:1], lses[:1]
    sink = [torch.tensor([0.5, -torch.inf, -1.0], dtype=F64)] if kind == "sink" else []
    operands = (*outputs, *lses, *sink)
    leaves = [x.clone().requires_grad_() for x in operands]
    count = len(outputs)

    def merge(*x):
        given = {"sink": x[2 * count]} if sink else {}
        output, lse = merge_states_reference(x[:count], x[count : 2 * count], **options, **given)
        return output, lse.masked_fill(lse.isinf(), 0.0)

    results = merge(*leaves)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, dtype=F64, generator=generator) for x in results]
    gradients = torch.autograd.grad(results, leaves, weights)

    def loss(*x):
        return sum((w * y).sum() for w, y in zip(weights, merge(*x), strict=True))

    step = 1e-6
    for leaf, gradient in enumerate(gradients):
        assert gradient.isfinite().all()
        for place in product(*map(range, gradient.shape)):
            if not operands[leaf][place].isfinite():  # has no difference quotient
                assert gradient[place] == 0
                continue
            moved = []
            for sign in (1, -1):
                others = [x.clone() for x in operands]
                others[leaf][place] += sign * step
                moved.append(loss(*others))
            slope = (moved[0] - moved[1]) / (2 * step)
            assert abs(slope - gradient[place]) < 1e-7
