"""The bits of a merged row depend on the row's own inputs: not on the kernel, nor on other rows."""

import pytest
import torch
from kernels_support import (
    COUNTS,
    HEAD_SIZE,
    ROWS,
    SINK,
    alike,
    any_kind,
    assert_runs,
    assert_same,
    make,
    nowhere,
    selecting,
)
from states_support import States, check, make_states
from support import BF16, INF, blank


@pytest.mark.parametrize("sink", [None, SINK], ids=["", "with a sink"])
@pytest.mark.parametrize("count", COUNTS)
def test_the_kernel_does_not_matter(count, sink, device):
    states = make(count, device, sink=sink)
    results = states.run()
    spread = blank((*ROWS, HEAD_SIZE), BF16, device, strides=(1360, 272, 2))
    others = {any_kind(count, elements=1): states._replace(out=spread)}
    if count <= 200:  # as many as may have a mask
        others[selecting(count)] = states._replace(empty=nowhere(states))
    assert_runs(states, alike(count))
    for kernel, other in others.items():
        assert_runs(other, kernel)
        assert_same(other.run(), results)


@pytest.mark.parametrize("options", [{"base": "2"}, {"out_lse_base": "2"}, {"sink": SINK}], ids=str)
def test_two_parts_that_are_no_pair(options, device):
    states = make(2, device, **options)
    results = states.run()
    spread = blank((*ROWS, HEAD_SIZE), BF16, device, strides=(1360, 272, 2))
    others = {
        selecting(2): states._replace(empty=nowhere(states)),
        any_kind(2, elements=1): states._replace(out=spread),
    }
    for kernel, other in others.items():
        assert_runs(other, kernel)
        assert_same(other.run(), results)


def cut(states: States, rows) -> States:
    """Those rows of the call, as views."""
    outputs, lses = ([x[rows] for x in each] for each in states[:2])
    masks = states.empty and [mask if mask is None else mask[rows] for mask in states.empty]
    return states._replace(outputs=outputs, lses=lses, empty=masks)


CUTS = [  # with the rows and the threads of a block
    ((slice(399, 400), slice(5, 6)), (1, 32 + 32)),
    ((slice(0, 1), slice(None)), (6, 128 + 32)),
    ((slice(101, 118), slice(1, 3)), (7, 128 + 32)),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [3, 5, 16, 17, 40])
def test_the_other_rows_do_not_matter(count, masked, device):
    states = make_states((400, 6), HEAD_SIZE, count, BF16, device)
    if masked:
        states = states._replace(empty=nowhere(states))
    assert_runs(states, selecting(count, rows=15) if masked else alike(count))
    out, lse = states.run()
    for rows, block in CUTS:
        some = cut(states, rows)
        assert_runs(some, selecting(count) if masked else alike(count, *block))
        assert_same(some.run(), (out[rows], lse[rows]))


@pytest.mark.parametrize("count", [3, 16, 17, 40])
def test_how_a_part_is_absent_does_not_matter(count, device):
    """By its LSE, which is -inf or +inf, by a mask, or by an index."""
    states = make(count, device, empty=False)
    tokens = torch.tensor([2, 5], device=device)
    absent = range(0, count, 2)
    results = []
    for value in (-INF, INF):
        gone = states.clone()
        for k in absent:
            gone.lses[k][tokens] = value
        assert_runs(gone, alike(count))
        results.append(check(gone))
    mask = torch.zeros(ROWS, dtype=torch.bool, device=device)
    mask[tokens] = True
    index = torch.arange(7, device=device).index_fill(0, tokens, -1)
    for name, operand in (("empty", mask), ("index", index)):
        gone = states._replace(**{name: [None if k % 2 else operand for k in range(count)]})
        assert_runs(gone, selecting(count))
        results.append(gone.run())
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [3, 5, 16, 17, 40])
def test_in_place_where_a_whole_block_reads_the_lse(count, masked, device):
    """Eight warps, of which one writes the merged LSE over one that all of them need."""
    states = make_states((17, 2), 2048, count, BF16, device)
    if masked:
        states = states._replace(empty=nowhere(states))
    results = states.run()
    for of_out, of_lse in ((0, -1), (-1, 0)):
        here = states.clone()
        here = here._replace(out=here.outputs[of_out], out_lse=here.lses[of_lse])
        assert_runs(here, selecting(count, 2048) if masked else alike(count, 1, 256 + 32))
        assert_same(here.run(), results)
