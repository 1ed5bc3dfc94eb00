"""Which kernel takes which update of a running state, and that it gives the bits of a merge."""

import pytest
import torch
from kernels_support import HEAD_SIZE, ROWS, assert_is, assert_same, each, few, pair, selecting
from states_support import States, check
from support import BF16, E4M3, F32, F64
from update_support import copies, state_and_block, update


def pair_generic(elements):
    return "generic", f"1 rows a block, {elements} elements at a time"


def tokens_last(x: torch.Tensor) -> torch.Tensor:
    """An LSE as FlashAttention has it, [B, H, S]; outputs as they are."""
    return x if x.shape[-1] == HEAD_SIZE else x.mT.contiguous().mT


SAME, WIDE = (BF16, BF16), (F32, BF16)
UPDATES = {
    "one dtype": (ROWS, SAME, {}, pair("15 tokens", 288)),
    "float64": (ROWS, (F64, F64), {}, pair_generic(1)),
    "FP8": (ROWS, (E4M3, E4M3), {}, pair_generic(8)),
    "a wide state": (ROWS, WIDE, {}, each(2)),
    "another base": (ROWS, SAME, {"lse_base": "2"}, few(2)),
    "another base, a wide state": (ROWS, WIDE, {"lse_base": "2"}, each(2)),
    "a mask": (ROWS, SAME, {"empty": torch.arange(35).view(ROWS) % 3 == 0}, selecting(2)),
    "an index": (ROWS, SAME, {"index": torch.arange(7)}, selecting(2)),
    "tokens last": ((2, 6, 5), SAME, {}, each(2)),
    "tokens last, a batch of one": ((1, 6, 5), SAME, {}, pair("6 tokens", 160)),
}


@pytest.mark.parametrize("case", UPDATES)
def test_an_update(case, device):
    rows, dtypes, options, kernel = UPDATES[case]
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    state, block = state_and_block(rows, HEAD_SIZE, dtypes, device)
    if "tokens last" in case:
        (out, lse), (block_out, block_lse) = state, block
        state, block = (out, tokens_last(lse)), (block_out, tokens_last(block_lse))
    check_update(state, block, options, kernel)


@pytest.mark.parametrize(
    ("dtypes", "kernel"), [(SAME, pair("15 heads", 288)), (WIDE, each(2))], ids=str
)
def test_an_update_of_the_later_half(dtypes, kernel, device):
    """Of a batch of sequences, as a zigzag ring has it."""
    state, _ = state_and_block((2, 8, 5), HEAD_SIZE, dtypes, device)
    _, block = state_and_block((2, 4, 5), HEAD_SIZE, dtypes, device, seed=1)
    check_update([x[:, 4:] for x in state], block, {}, kernel)


def check_update(state, block, options, kernel) -> None:
    """It gives the bits of a merge, which is compared with the reference."""
    merge = {"lse_base": options.get("lse_base", "e"), "out_dtype": state[0].dtype}
    if "empty" in options:
        merge["empty"] = [None, options["empty"]]
    outputs, lses = (list(each) for each in zip(copies(state), block, strict=True))
    merged = check(States(outputs, lses, **merge))
    inspect = torch.ops.merge_attn_states.inspect_update_state
    assert_is(inspect(*state, *block, **options), kernel, state[0])
    update(*state, *block, **options)
    assert_same(state, merged)
