"""merge_states beside the reference: layouts, dtypes, bases, masks, indices, numbers of parts."""

import itertools
import math

import pytest
import torch
from conftest import CUDA
from hypothesis import given
from hypothesis import strategies as st
from states_support import States, check, make_states
from support import BF16, E4M3, E5M2, F16, F32, F64, INF, NAN, assert_bits, place

import merge_attn_states
from merge_attn_states import merge_states

COUNTS = [1, 2, 3, 4, 7, 8, 16, 17, 40]  # sums of sixteen end at 16


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_any_number_of_parts(count, dtype, device):
    check(make_states((7, 5), 72, count, dtype, device))


@pytest.mark.parametrize("rows", [(9,), (5, 3), (2, 4, 3), (2, 3, 4, 5), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("head_size", [1, 7, 8, 40, 64, 128, 576])
def test_rows_of_one_to_four_dimensions(rows, head_size, device):
    check(make_states(rows, head_size, 3, BF16, device))


@pytest.mark.parametrize("base", ["e", "2", ["e", "2", "2", "e"], ["2", "e", "e", "2"]])
@pytest.mark.parametrize("out_base", ["e", "2"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("center", [2.0, -88.0, 100.0, 1e5])
def test_bases(base, out_base, sink, center, device):
    logits = torch.tensor([center, -INF, 3.0 + center], device=device) if sink else None
    for dtype in (F32, F64):
        own = logits.to(dtype) if sink else None
        check(
            make_states(
                (6, 3),
                16,
                4,
                dtype,
                device,
                base=base,
                center=center,
                sink=own,
                out_lse_base=out_base,
            )
        )


@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F32, F16), (F16, BF16)])
@pytest.mark.parametrize("out_dtype", [None, F32, F16, BF16])
def test_mixed_dtypes(dtypes, out_dtype, device):
    states = make_states((6, 3), 72, len(dtypes), dtypes, device, out_dtype=out_dtype)
    out, _ = check(states)
    assert out.dtype == (out_dtype or F32)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fp8(fp8, count, device):
    scale = torch.tensor(0.5, device=device)
    check(make_states((6, 3), 72, count, fp8, device))
    check(make_states((6, 3), 72, count, fp8, device, out_scale=scale))
    check(make_states((6, 3), 72, count, fp8, device, out_dtype=F16))
    check(make_states((6, 3), 72, count, BF16, device, out_dtype=fp8, out_scale=scale))


@pytest.mark.parametrize("sink", [[0.5, -1.0, 40.0], [INF, -INF, -300.0], [NAN, 0.0, 1e5]])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_sink_is_a_part_without_values(sink, count, dtype, device):
    check(
        make_states(
            (6, 3), 24, count, F32, device, sink=torch.tensor(sink, dtype=dtype, device=device)
        )
    )


def test_a_sink_counts_in_the_lse_once(device):
    states = make_states((6, 3), 24, 2, F32, device, empty=False)
    out, lse = states._replace(sink=torch.zeros(3, device=device)).run()
    both, of_both = states.run()
    torch.testing.assert_close(lse, torch.logaddexp(of_both, torch.zeros_like(of_both)))
    torch.testing.assert_close(out, both * (of_both - lse).exp()[..., None])


def test_nobody_and_a_sink(device):
    empty = torch.full((2, 3), -INF, device=device)
    outputs = torch.full((2, 3, 8), NAN, device=device)
    out, lse = merge_states(
        [outputs] * 3, [empty] * 3, sink=torch.tensor([1.0, -INF, 2.0], device=device)
    )
    assert (out == 0).all()
    assert lse[0].tolist() == [1.0, -INF, 2.0]


@pytest.mark.parametrize("polarity", [False, True])
@pytest.mark.parametrize("trailing", [False, True])
def test_rows_that_the_caller_declares_empty(polarity, trailing, device):
    states = make_states((7, 5), 40, 3, BF16, device, empty=False)
    masks = [torch.rand(7, 5, device=device) < 0.4 for _ in range(3)]
    masks[1] = None
    masks[2] = masks[2][:, :1].expand(7, 5)  # a token's, of all heads
    for output, lse, mask in zip(states.outputs, states.lses, masks, strict=True):
        if mask is not None:
            output[mask] = NAN
            lse[mask] = 0.0  # a kernel's finite lie
    if trailing:
        masks = [None if mask is None else mask[..., None] for mask in masks]
    if not polarity:
        check(states._replace(empty=masks))
        return
    inverted = [None if mask is None else ~mask for mask in masks]
    op = torch.ops.merge_attn_states.merge_states
    out, lse = op(states.outputs, states.lses, [], inverted, invert_empty=True)
    expected, expected_lse = merge_states(states.outputs, states.lses, empty=masks)
    assert_bits(out, expected)
    assert_bits(lse, expected_lse)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows_by_an_index(kind, device):
    tokens, heads = 9, 3
    states = make_states((5, heads), 40, 3, BF16, device, empty=False)
    own = make_states((tokens, heads), 40, 1, BF16, device, seed=1)
    index = [
        torch.tensor([-1, 4, 0, 0, 3, -1, 2, 1, -1], dtype=kind, device=device),
        torch.tensor([-1, -1, 4, 3, 2, 1, 0, 0, 0] * 2, dtype=kind, device=device)[::2],
        torch.full((tokens,), -1, dtype=kind, device=device),
        None,
    ]
    check(States([*states.outputs, *own.outputs], [*states.lses, *own.lses], index=index))
    check(States(states.outputs[:1], states.lses[:1], index=index[:1]))  # absent: zeros


def test_an_index_of_a_part_without_rows(device):
    own = make_states((4, 3), 16, 1, F32, device)
    nothing = make_states((0, 3), 16, 1, F32, device)
    index = [torch.full((4,), -1, device=device), None]
    check(States([*nothing.outputs, *own.outputs], [*nothing.lses, *own.lses], index=index))


def test_what_is_out_of_range_on_the_cpu_is_named():
    states = make_states((5, 3), 16, 2)
    for wrong in (5, -2):
        index = [None, torch.tensor([0, 1, wrong, 3, 4])]
        with pytest.raises(
            ValueError, match=rf"index\[1\]: expected rows in \[0, 5\) or -1, got {wrong} at 2"
        ):
            states._replace(index=index).run()


def test_what_is_out_of_range_on_a_gpu_is_absent(cuda):
    states = make_states((5, 3), 16, 2, F32, cuda)
    check(states._replace(index=[None, torch.tensor([0, 5, 2**31 - 1, -7, 4], device=cuda)]))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 33, 256])
def test_a_stack(dim, count, device):
    states = make_states((6, 3), 24, count, BF16, device)
    outputs = torch.stack(states.outputs, dim)
    lses = torch.stack(states.lses, dim)
    out, lse = check(states._replace(outputs=outputs, lses=lses, dim=dim))
    listed, listed_lse = states.run()
    assert_bits(out, listed)
    assert_bits(lse, listed_lse)


def test_a_stack_with_masks_and_indices(device):
    states = make_states((6, 3), 24, 3, BF16, device)
    outputs, lses = torch.stack(states.outputs, 1), torch.stack(states.lses, 1)
    empty = [None, torch.rand(6, 3, device=device) < 0.5, None]
    index = [torch.tensor([5, -1, 0, 2], device=device)] * 3
    check(States(outputs, lses, dim=1, empty=empty))
    check(States(outputs, lses, dim=1, index=index, empty=empty))


def test_the_most_parts(device):
    check(make_states((2, 3), 8, 1024, F32, device))
    check(make_states((2, 3), 8, 200, [F32, BF16] * 100, device))


def test_two_natural_parts_are_the_pair(device):
    for dtype in (F32, F16, BF16, F64):
        states = make_states((33, 6), 80, 2, dtype, device)
        lses = [place(lse.T.contiguous(), device) for lse in states.lses]
        for scale, out_dtype in ((None, dtype), (torch.tensor(0.25, device=device), E4M3)):
            if dtype == F64 and scale is not None:
                continue
            output = torch.empty(33, 6, 80, dtype=out_dtype, device=device)
            output_lse = torch.empty_like(lses[0])
            merge_attn_states.merge_attn_states(
                output,
                states.outputs[0],
                lses[0],
                states.outputs[1],
                lses[1],
                output_lse,
                None,
                scale,
            )
            for given_lses in ([lse.T for lse in lses], states.lses):
                out, lse = merge_states(
                    states.outputs, given_lses, out_dtype=out_dtype, out_scale=scale
                )
                assert_bits(out, output)
                assert_bits(lse, output_lse.T)


def test_a_pair_that_the_other_kernel_takes_has_the_same_bits(device):
    """A mask, an index or a dimension more leads past the pair's kernel."""
    for dtype in (F32, F16, BF16, F64):
        states = make_states((33, 6), 80, 2, dtype, device)
        out, lse = states.run()
        nothing = [torch.zeros(33, 6, dtype=torch.bool, device=device), None]
        for other in (
            states._replace(empty=nothing),
            states._replace(index=[torch.arange(33, device=device), None]),
        ):
            assert_bits(other.run()[0], out)
            assert_bits(other.run()[1], lse)


def test_a_layout_of_every_producer(device):
    """[B, S, H, D] beside [B, H, S]; [B, H, S, D]; a trailing 1; padded heads; halves."""
    states = make_states((2, 6, 5), 40, 3, BF16, device)
    lses = [lse.transpose(1, 2).contiguous().transpose(1, 2) for lse in states.lses]
    check(states._replace(lses=lses))
    check(states._replace(lses=[lse[..., None] for lse in lses]))
    inner = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in states.outputs]
    check(states._replace(outputs=inner))
    padded = [torch.nn.functional.pad(x.float(), (0, 8)).to(BF16)[..., :40] for x in states.outputs]
    check(states._replace(outputs=padded, lses=lses))
    half = States([x[:, 3:] for x in states.outputs], [x[:, 3:] for x in lses])
    check(half)
    step = States([x[..., ::2] for x in states.outputs], lses)
    check(step)
    expanded = States(
        [x[:1].expand(2, 6, 5, 40) for x in states.outputs],
        [x[:1].expand(2, 6, 5) for x in states.lses],
    )
    check(expanded)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_in_place_on_any_part(which, device):
    for dtype, head_size in ((F32, 64), (BF16, 72), (E4M3, 40), (F64, 8)):
        states = make_states((6, 5), head_size, 3, dtype, device)
        check(states._replace(out=states.outputs[which], out_lse=states.lses[(which + 1) % 3]))
        states = make_states((6, 5), head_size, 3, dtype, device)
        stacked = States(torch.stack(states.outputs), torch.stack(states.lses), dim=0)
        check(stacked._replace(out=stacked.outputs[which], out_lse=stacked.lses[which]))


def test_results_that_are_given(device):
    states = make_states((6, 5), 40, 3, BF16, device)
    out = torch.empty(6, 80, 5, dtype=F32, device=device).transpose(1, 2)[..., ::2]
    out_lse = torch.empty(5, 6, 1, device=device).transpose(0, 1)
    given, given_lse = check(states._replace(out=out, out_lse=out_lse))
    assert given is out
    assert given_lse is out_lse
    made, lse = states._replace(out_lse=out_lse).run()
    assert made.is_contiguous()
    assert lse is out_lse
    _, none = states._replace(return_lse=False).run()
    assert none is None
    _, none = states._replace(out=out, return_lse=False).run()
    assert none is None
    _, new = states._replace(out=out).run()
    assert_bits(new, given_lse.squeeze(-1))


@pytest.mark.parametrize("rows", [(0, 3), (4, 0), (0,), (2, 0, 3)])
def test_no_rows(rows, device):
    out, lse = make_states(rows, 16, 3, F32, device).run()
    assert out.shape == (*rows, 16)
    assert lse.shape == rows


def test_no_elements(device):
    states = make_states((6, 3), 0, 3, F32, device)
    check(states)


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_a_nan_lse_makes_its_own_row_nan(row, device):
    states = make_states((6, 3), 16, 3, F32, device)
    states.lses[1].view(-1)[row] = NAN
    out, lse = check(states)
    assert out.view(-1, 16)[row].isnan().all()
    assert lse.view(-1)[row].isnan()


@st.composite
def calls(draw):
    """Any rows, strides, dtypes, bases, masks, indices and sinks."""
    count = draw(st.sampled_from([1, 2, 2, 3, 5, 17]))
    rows = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    head_size = draw(st.sampled_from([1, 8, 24, 33, 64, 96, 130]))
    kind = draw(st.sampled_from(["same", "mixed", "wide"]))
    same = draw(st.sampled_from([F32, F16, BF16]))
    dtypes = {
        "same": [same] * count,
        "mixed": [draw(st.sampled_from([F32, F16, BF16])) for _ in range(count)],
        "wide": [F64] * count,
    }[kind]
    bases = [draw(st.sampled_from("e2")) for _ in range(count)]
    if draw(st.booleans()):
        bases = bases[:1] * count
    out_base = draw(st.sampled_from("e2"))
    states = make_states(
        rows,
        head_size,
        count,
        dtypes,
        base=bases,
        seed=draw(st.integers(0, 2**20)),
        center=draw(st.sampled_from([0.0, 90.0, -1e4])),
        spread=draw(st.sampled_from([1.0, 40.0])),
        out_lse_base=out_base,
    )
    order = draw(st.permutations(range(len(rows))))
    back = [order.index(i) for i in range(len(rows))]

    def shuffled(x):  # the same values in memory of another order
        last = [len(rows)] if x.dim() > len(rows) else []
        return x.permute(*order, *last).contiguous().permute(*back, *last)

    for k in range(count):
        if draw(st.booleans()):
            states.outputs[k] = shuffled(states.outputs[k])
        if draw(st.booleans()):
            states.lses[k] = shuffled(states.lses[k])
    if draw(st.booleans()):
        masks = [torch.rand(rows) < 0.3 if draw(st.booleans()) else None for _ in range(count)]
        states = states._replace(empty=masks)
    if draw(st.booleans()):
        wide = F64 if kind == "wide" else draw(st.sampled_from([F32, BF16]))
        states = states._replace(sink=(5 * torch.randn(rows[-1])).to(wide))
    if len(rows) == 2 and draw(st.booleans()):
        tokens = draw(st.integers(1, 9))
        index = [torch.randint(-1, rows[0], (tokens,)) for _ in range(count)]
        states = states._replace(index=index)
    return states


@pytest.mark.parametrize("device", ["cpu", CUDA])
@given(states=calls())
def test_any_call(device, states):
    check(_to(states, device))


def _to(states: States, device: str) -> States:
    def moved(value):
        if isinstance(value, list):
            return [moved(each) for each in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return States(*map(moved, states))


def test_grouping_does_not_matter(device):
    """Merged in any grouping, float32 states agree within the bound."""
    states = make_states((6, 3), 40, 8, F32, device, empty=False)
    whole, whole_lse = states.run()
    halves = [
        merge_states(states.outputs[a:b], states.lses[a:b]) for a, b in ((0, 3), (3, 4), (4, 8))
    ]
    out, lse = merge_states([o for o, _ in halves], [x for _, x in halves])
    largest = torch.stack(states.outputs).abs().amax(0)
    assert ((out - whole).abs() <= 16 * torch.finfo(F32).eps * largest).all()
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


def test_a_row_depends_on_nothing_but_its_own_inputs(device):
    states = make_states((40, 6), 72, 5, BF16, device)
    out, lse = states.run()
    for first, last in ((0, 1), (7, 20), (39, 40)):
        some = States([x[first:last] for x in states.outputs], [x[first:last] for x in states.lses])
        assert_bits(some.run()[0], out[first:last])
        assert_bits(some.run()[1], lse[first:last])


@pytest.mark.parametrize("count", [1, 7, 64])
def test_chunks_of_keys_are_one_attention(count, device):
    """Softmax attention over all keys, in float64, is the merge of that over each chunk."""
    tokens, heads, keys, size = 5, 3, 64 * 7, 16
    query, key, value = (
        torch.randn(heads, n, size, dtype=F64, device=device) for n in (tokens, keys, keys)
    )
    scores = query @ key.transpose(1, 2) / math.sqrt(size)

    def attend(first, last):
        part = scores[..., first:last]
        output = part.softmax(-1) @ value[:, first:last]
        return output.transpose(0, 1), part.logsumexp(-1).T

    borders = [keys * k // count for k in range(count + 1)]
    parts = [attend(a, b) for a, b in itertools.pairwise(borders)]
    out, lse = merge_states([o for o, _ in parts], [x for _, x in parts])
    whole, whole_lse = attend(0, keys)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
