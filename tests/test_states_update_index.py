"""update_state by an index: the rows of the state that it names are merged, no others touched."""

import pytest
import torch
from states_support import States, compare
from support import BF16, F32, F64, INF, assert_bits, place
from update_support import copies, fresh_state, state_and_block, update

from merge_attn_states import update_state

INDICES = {
    "some rows, in disorder": [5, 0, 3, 8],
    "nothing for some": [-1, 7, -1, 2],
    "nothing": [-1, -1, -1, -1],
    "the last one": [8, -1, -1, -1],
}
KINDS = [torch.int32, torch.int64]


def check_indexed(state, block, index, **options) -> None:
    """The rows that are named are merged; every other one keeps its bytes."""
    (out, lse), (block_out, block_lse) = state, block
    before, before_lse = out.clone(), lse.clone()
    update(out, lse, block_out, block_lse, index=index, **options)
    taken = (index >= 0).nonzero().squeeze(-1)
    named = index[taken].long()
    masks = {"empty": [None, options["empty"][taken]]} if "empty" in options else {}
    rows = States([before[named], block_out[taken]], [before_lse[named], block_lse[taken]], **masks)
    compare(rows, out[named], lse[named])
    others = torch.ones(len(out), dtype=torch.bool, device=out.device)
    others[named] = False
    assert_bits(out[others], before[others])
    assert_bits(lse[others], before_lse[others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", INDICES)
@pytest.mark.parametrize("dtypes", [(F32, BF16), (F32, F32), (F64, F64)], ids=str)
def test_rows_by_an_index(dtypes, case, kind, device):
    state, _ = state_and_block((9, 3), 40, dtypes, device)
    _, block = state_and_block((4, 3), 40, dtypes, device, seed=1)
    state[0][6], state[1][6] = (
        7.0,
        INF,
    )  # unnamed: an infinite LSE and its values stay what they are
    check_indexed(state, block, torch.tensor(INDICES[case], dtype=kind, device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_of_any_stride_beside_a_strided_state(kind, device):
    (out, lse), _ = state_and_block((9, 3), 40, device=device)
    state = place(out, device, (50, 9 * 50, 1)), place(lse, device, (1, 10))[..., None]
    _, (block_out, block_lse) = state_and_block((4, 3), 40, device=device, seed=1)
    numbers = torch.tensor([77, 5, 99, 1, 77, -1, 99, 8], dtype=kind, device=device)
    mask = torch.tensor([True, False, False, False], device=device)[:, None].expand(4, 3)
    block_lse[0] = 0.0
    check_indexed(state, (block_out, block_lse), numbers[1::2], empty=mask)


def test_many_rows_by_an_index(device):
    """More than the tiles of one thread; only a tenth of the state is named."""
    state, _ = state_and_block((5000, 3), 40, device=device)
    _, block = state_and_block((500, 3), 40, device=device, seed=1)
    check_indexed(state, block, torch.randperm(5000)[:500].to(device))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [9, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place_of_wrong", [0, 3])
def test_out_of_range_on_the_cpu_it_is_named_and_nothing_is_written(place_of_wrong, wrong, kind):
    state, _ = state_and_block((9, 3), 40)
    _, block = state_and_block((4, 3), 40, seed=1)
    before = copies(state)
    index = torch.tensor([0, 1, 2, 3], dtype=kind)
    index[place_of_wrong] = wrong
    message = rf"^index: expected rows in \[0, 9\) or -1, got {wrong} at {place_of_wrong}$"
    with pytest.raises(ValueError, match=message):
        update_state(*state, *block, index=index)
    assert_bits(state[0], before[0])
    assert_bits(state[1], before[1])


def test_out_of_range_on_a_gpu_a_row_is_skipped(cuda):
    state, _ = state_and_block((9, 3), 40, device=cuda)
    before = copies(state)
    _, block = state_and_block((4, 3), 40, device=cuda, seed=1)
    update(*state, *block, index=torch.tensor([9, -2, 2**31, -(2**40)], device=cuda))
    assert_bits(state[0], before[0])
    assert_bits(state[1], before[1])


def test_rows_of_the_same_number_stay_inside_the_state(device):
    """What becomes of the row is not said, but no other one is touched."""
    (out, lse), _ = state_and_block((9, 3), 40, device=device)
    _, block = state_and_block((40, 3), 40, device=device, seed=1)
    others = torch.arange(9, device=device) != 4
    before, before_lse = out.clone(), lse.clone()
    update(out, lse, *block, index=torch.full((40,), 4, device=device))
    assert_bits(out[others], before[others])
    assert_bits(lse[others], before_lse[others])


def test_a_state_or_a_block_of_no_rows(device):
    state, block = fresh_state((0, 3), 40, F32, device), fresh_state((4, 3), 40, F32, device)
    update(*state, *block, index=torch.full((4,), -1, device=device))
    full, _ = state_and_block((4, 3), 40, device=device)
    before = copies(full)
    update(*full, *state, index=torch.empty(0, dtype=torch.int64, device=device))
    assert_bits(full[0], before[0])
