"""Which kernel takes which call of many parts, on both sides of every border, and that it is right.

On CUDA two plain parts are the pair's call. Parts that differ in their addresses alone, in rows of
whole 16-byte packs, have kernels for up to 2, 4, 8 and 16 of them, which take some rows a block,
and one for more, which takes one. Up to 8 parts that lie each apart have kernels too, as long as
they have one dtype, or float32 the first. Everything else goes to the kernel of any kind.
"""

import pytest
import torch
from kernels_support import (
    COUNTS,
    HEAD_SIZE,
    ROWS,
    SINK,
    alike,
    any_kind,
    assert_is,
    assert_runs,
    assert_same,
    each,
    few,
    make,
    nowhere,
    pair,
    selecting,
    stack,
)
from states_support import States, check, make_states
from support import BF16, E4M3, F16, F32, F64, blank, make_call, place
from support import check as check_pair
from update_support import update

from merge_attn_states import selected_kernel

# Two parts.

PAIRS = [  # 4,096 elements of 16 bits are a block's 512 packs
    (F32, 80), (F16, 80), (BF16, 80), (BF16, 4096), (BF16, 4104), (BF16, 81), (F64, 80), (E4M3, 80),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "head_size"), PAIRS)
def test_two_plain_parts_are_the_pair(dtype, head_size, device):
    call = make_call((33, 6, head_size), dtype, device)
    kernel = selected_kernel(*call)
    state, block = (call[1], call[2].T), (call[3], call[4].T)
    states = States(*(list(each) for each in zip(state, block, strict=True)))
    lses = torch.stack([call.prefix_lse, call.suffix_lse]).mT
    merged = check_pair(call).output, call.output_lse.T
    for same in (states, States(torch.stack(states.outputs), lses, dim=0)):
        assert_runs(same, kernel)
        assert_same(same.run(), merged)
    masked = states._replace(empty=nowhere(states))
    is_apart = dtype in (F32, F16, BF16) and head_size % 8 == 0 and head_size <= 4096
    in_packs = dtype != F64 and head_size % 8 == 0
    apart = any_kind(2, elements=8 if in_packs else 1)
    assert_runs(masked, selecting(2, head_size) if is_apart else apart)
    assert_same(masked.run(), merged)
    inspect = torch.ops.merge_attn_states.inspect_update_state
    assert_is(inspect(*state, *block), kernel, state[0])
    update(*state, *block)
    assert_same(state, merged)


def test_dimensions_that_continue_each_other_are_one(device):
    states = make(2, device)
    assert_runs(states, pair("15 tokens", 288))
    assert_runs(states._replace(return_lse=False), pair("15 tokens", 256))
    check(states._replace(return_lse=False))


@pytest.mark.parametrize(
    "options", [{"sink": SINK}, {"base": "2"}, {"out_lse_base": "2"}], ids=",".join
)
def test_two_parts_that_are_no_pair(options, device):
    states = make(2, device, **options)
    is_a_pair = "out_lse_base" in options  # by its weights
    assert_runs(states, each(2) if is_a_pair else few(2))
    check(states)


# Parts that differ in their addresses alone.

CALLS = {
    "plain": {},
    "without an LSE": {"return_lse": False},
    "with a sink": {"sink": SINK},
    "into another base": {"base": "2", "out_lse_base": "e"},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("count", COUNTS)
def test_alike_parts(count, options, device):
    states = make(count, device, **options)
    kernel = alike(count, threads=160 if states.return_lse else 128)
    assert_runs(states, kernel)
    results = check(states)
    for dim in (0, 1):
        stacked = stack(states, dim)
        assert_runs(stacked, kernel)
        assert_same(stacked.run(), results)


@pytest.mark.parametrize("count", [3, 8, 16, 17])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_alike_parts_of_other_dtypes(dtype, count, device):
    states = make_states(ROWS, 17 * 16 // dtype.itemsize, count, dtype, device)
    assert_runs(states, alike(count))
    check(states)


@pytest.mark.parametrize("count", [3, 16, 17])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("packs", [1, 256, 257])
def test_rows_of_one_pack_and_of_as_many_as_a_block_has_threads(packs, dtype, count, device):
    """Beyond them the kernel of any kind reads eight elements at a time, or one."""
    elements = packs * 16 // dtype.itemsize
    beyond = any_kind(count, elements=8 if dtype == BF16 else 1)
    kernels = {1: alike(count, 6, 64), 256: alike(count, 1, 256 + 32), 257: beyond}
    states = make_states((3, 2), elements, count, dtype, device)
    assert_runs(states, kernels[packs])
    check(states)


@pytest.mark.parametrize("beyond", [0, 1])
def test_lses_at_the_border_of_32_bits(beyond, cuda, gigabytes):
    heads, head_size = 17, 128
    stride = 2**32 - 1 - head_size - (heads - 1) + beyond
    if torch.cuda.mem_get_info()[0] < 1.05 * 4 * stride:
        pytest.skip("16 GiB of GPU memory are not free")
    states = make_states((2, heads), head_size, 3, BF16, cuda, empty=False)
    far = torch.empty(stride + heads, device=cuda).as_strided((2, heads), (stride, 1))
    far.copy_(states.lses[0])
    states = states._replace(lses=[far] * 3)
    assert_runs(states, each(3, head_size) if beyond else few(3, 8))
    assert_same(states.run(), states._replace(lses=[far.contiguous()] * 3).run())


# Everything else.


def laid(states: States, *lays) -> States:
    """The same parts, the first ones in other memory: `lays` are functions of a tensor."""
    outputs = [lay(x) for lay, x in zip(lays, states.outputs, strict=False)]
    return states._replace(outputs=outputs + states.outputs[len(outputs) :])


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def with_masks(device) -> States:
    mask = torch.arange(35, device=device).view(ROWS) % 3 == 0
    return make(3, device)._replace(empty=[None, mask, None])


def with_an_index(device) -> States:
    index = torch.tensor([3, -1, 0, 0, 6, 5, -1], device=device)
    return make(3, device)._replace(index=[None, index, None])


def into_fp8(device) -> States:
    return make(3, device, out_dtype=E4M3, out_scale=torch.tensor(0.37, device=device))


def of_three_dimensions(device) -> States:
    """As [B, H, S, D], which no two strides describe."""
    return laid(make_states((2, 3, 5), HEAD_SIZE, 3, BF16, device), *[heads_first] * 3)


def of_four_dimensions(device) -> States:
    """No two of which continue one another in every part."""
    states = make_states((2, 3, 2, 5), HEAD_SIZE, 3, BF16, device)
    turned = [lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), heads_first, heads_first]
    return laid(states, *turned)


def into_an_unaligned_output(device) -> States:
    return make(3, device)._replace(out=blank((*ROWS, HEAD_SIZE), BF16, device, offset=1))


APART = {
    "another dtype of the output": lambda device: make(3, device, out_dtype=F32),
    "a wide first part": lambda device: make(3, device, [F32, BF16, BF16]),
    "another layout of one part": lambda device: laid(make(3, device), heads_first),
    "three dimensions of rows": of_three_dimensions,
    "four dimensions of rows": of_four_dimensions,
}
SELECTED = {"masks": with_masks, "an index": with_an_index}
OTHERS = {
    "dtypes that differ": lambda device: make(3, device, [F32, BF16, F16]),
    "a wide second part": lambda device: make(3, device, [BF16, F32, BF16]),
    "bases that differ": lambda device: make(3, device, base="e2e", out_lse_base="2"),
    "a sink in another base": lambda device: make(3, device, sink=SINK, out_lse_base="2"),
    "nine parts": lambda device: laid(make(9, device), heads_first),
    "FP8": lambda device: make(3, device, E4M3),
    "an FP8 output": into_fp8,
}
ONE_BY_ONE = {
    "float64": lambda device: make(3, device, F64),
    "half a pack": lambda device: make_states(ROWS, 132, 3, BF16, device),
    "an unaligned part": lambda device: laid(make(3, device), lambda x: place(x, offset=4)),
    "an unaligned output": into_an_unaligned_output,
    "unaligned rows": lambda device: laid(
        make(3, device), *[lambda x: place(x, strides=(700, 140, 1))] * 3
    ),
    "a step of two elements": lambda device: laid(
        make(3, device), lambda x: place(x, strides=(1360, 272, 2))
    ),
}


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F32, F32), (F32, BF16), (F32, F16)])
def test_parts_that_lie_each_apart(dtypes, count, device):
    first, others = dtypes
    states = make_states((3, 5, 4), HEAD_SIZE, count, [first, *[others] * (count - 1)], device)
    masks = [torch.arange(60, device=device).view(3, 5, 4) % 7 == k for k in range(count)]
    states = laid(states, heads_first)
    assert_runs(states, each(count))
    check(states)
    states = states._replace(empty=masks)
    assert_runs(states, selecting(count))
    check(states)


@pytest.mark.parametrize("made", APART.values(), ids=APART)
def test_parts_that_are_not_alike(made, device):
    states = made(device)
    assert_runs(states, each(3))
    check(states)


@pytest.mark.parametrize("made", SELECTED.values(), ids=SELECTED)
def test_parts_with(made, device):
    states = made(device)
    assert_runs(states, selecting(3))
    check(states)


@pytest.mark.parametrize("made", OTHERS.values(), ids=OTHERS)
def test_any_kind_of_parts(made, device):
    states = made(device)
    assert_runs(states, any_kind(len(states.outputs)))
    check(states)


@pytest.mark.parametrize("made", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_any_kind_of_parts_without_packs(made, device):
    states = made(device)
    assert_runs(states, any_kind(3, elements=1))
    check(states)


@pytest.mark.parametrize(
    ("count", "rows"),
    [(3, 6), (16, 6), (17, 6), (200, 5)],  # the whole call's share, then as many weights as fit
)
def test_rows_that_share_a_block_of_the_kernel_of_any_kind(count, rows, device):
    dtypes = [F32, F16, *[BF16] * (count - 2)]
    states = make_states((6 * 132, 1), 8, count, dtypes, device)
    assert_runs(states, any_kind(count, rows))
    check(states)
