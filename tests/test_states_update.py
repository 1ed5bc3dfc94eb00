"""update_state: a running state that blocks are merged into, in place, whole or row by row."""

import pytest
import torch
from states_support import States, compare
from support import (
    BF16,
    E4M3,
    F16,
    F32,
    F64,
    INF,
    NAN,
    assert_bits,
    assert_within,
    bits,
    place,
)
from update_support import copies, fresh_state, state_and_block, update

from merge_attn_states import merge_states, update_state
from merge_attn_states.reference import merge_states_reference


def check_update(state, block, **options) -> None:
    """The state, an output with its LSE, becomes the merge of itself and the block."""
    out, lse = state
    of_block = {"empty": [None, options["empty"]]} if "empty" in options else {}
    before = States(
        [out.clone(), block[0]], [lse.clone(), block[1]], lse_base=options.get("lse_base", "e"),
        **of_block,
    )  # fmt: skip
    update(out, lse, *block, **options)
    compare(before, out, lse)


DTYPES = [  # of a state and its blocks
    (F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, BF16), (BF16, F32), (F64, F64),
    (E4M3, E4M3),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [1, 40, 72, 128])  # an element, packs and a rest, packs
def test_a_block_is_merged(head_size, dtypes, device):
    state, block = state_and_block((7, 5), head_size, dtypes, device)
    check_update(state, block)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_state_begins_without_a_key(dtypes, device):
    out, lse = fresh_state((6, 3), 40, dtypes[0], device)
    _, (block_out, block_lse) = state_and_block((6, 3), 40, dtypes, device, empty=False)
    block_out[5], block_lse[5] = NAN, -INF  # a block without keys leaves it so
    update(out, lse, block_out, block_lse)
    assert_bits(out[:5], block_out[:5].to(dtypes[0]))
    assert_bits(lse[:5], block_lse[:5])
    assert (bits(out[5]) == 0).all()
    assert (lse[5] == -INF).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_the_bits_of_a_merge_into_the_state(dtype, device):
    for rows, base in (((33, 6), "e"), ((33, 6), "2"), ((2, 9, 3), "e")):
        state, block = state_and_block(rows, 80, [dtype] * 2, device, base=base)
        outputs, lses = zip(tuple(x.clone() for x in state), block, strict=True)
        merge_states(outputs, lses, lse_base=base, out=outputs[0], out_lse=lses[0])
        update(*state, *block, lse_base=base)
        assert_bits(state[0], outputs[0])
        assert_bits(state[1], lses[0])


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("center", [2.0, -88.0, 1e5])  # also beyond what exp can take
def test_bases(base, center, device):
    state, block = state_and_block((7, 5), 24, base=base, center=center, device=device)
    check_update(state, block, lse_base=base)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_error_of_a_long_chain_does_not_grow(dtype, device):
    """A ring of 64 ranks: what 16 bits round off at every step is not lost from a float32 state."""
    rows, steps = (40, 4), 64
    random = torch.Generator().manual_seed(0)
    blocks = [torch.randn(*rows, 64, generator=random).to(dtype) for _ in range(steps)]
    lses = [2 + torch.randn(rows, generator=random) for _ in range(steps)]
    wide, narrow = (fresh_state(rows, 64, own, device) for own in (F32, dtype))
    eps = torch.finfo(F32).eps
    for step in range(steps):
        for state in (wide, narrow):
            update_state(*state, blocks[step].to(device), lses[step].to(device))
        if (step + 1).bit_count() > 1:
            continue
        # The bound of one merge, after 1, 2, 4 ... 64 of them.
        expected, expected_lse = merge_states_reference(blocks[: step + 1], lses[: step + 1])
        bound = 8 * eps * torch.stack(blocks[: step + 1]).to(F64).abs().amax(0)
        assert_within(wide[0].cpu(), expected, bound)
        assert_within(wide[1].cpu(), expected_lse, 8 * eps * expected_lse.abs().clamp(min=1))
    lost = (narrow[0].cpu().to(F64) - expected).abs()
    assert (lost > bound).any(), "a 16-bit state would do as well: the test shows nothing"


@pytest.mark.parametrize("polarity", [False, True])
def test_rows_that_the_caller_declares_empty(polarity, device):
    state, (block_out, block_lse) = state_and_block((7, 5), 40, device=device, empty=False)
    mask = (torch.rand(7, 1) < 0.5).to(device).expand(7, 5)  # a token's, of all heads
    block_out[mask], block_lse[mask] = NAN, 0.0
    if not polarity:
        check_update(state, (block_out, block_lse), empty=mask)
        return
    expected = [x.clone() for x in state]
    update_state(*expected, block_out, block_lse, empty=mask[..., None])
    op = torch.ops.merge_attn_states.update_state
    op(*state, block_out, block_lse, empty=~mask, invert_empty=True)
    assert_bits(state[0], expected[0])
    assert_bits(state[1], expected[1])


# Layouts.


def test_heads_first_lses_beside_tokens_first_outputs(device):
    """[B, S, H, D] beside [B, H, S], as FlashAttention has it; a trailing 1, as cuDNN has it."""
    for trailing in (False, True):
        state, block = state_and_block((2, 6, 5), 40, device=device)
        inner = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (state[1], block[1])]
        lse, block_lse = (x[..., None] if trailing else x for x in inner)
        check_update((state[0], lse), (block[0], block_lse))


def test_a_trailing_1_on_either_side(device):
    for own, of_block in ((True, False), (False, True)):
        (out, lse), (block_out, block_lse) = state_and_block((7, 5), 40, device=device)
        lse, block_lse = (
            lse[..., None] if own else lse,
            block_lse[..., None] if of_block else block_lse,
        )
        before = States([out.clone(), block_out], [lse.clone(), block_lse])
        update(out, lse, block_out, block_lse)
        compare(before, out, lse)


def test_half_of_a_state_is_a_view(device):
    """The later half of the queries, as a zigzag ring has it: the other half stays as it is."""
    (out, lse), _ = state_and_block((2, 8, 5), 40, device=device)
    _, block = state_and_block((2, 4, 5), 40, device=device, seed=1)
    before = copies((out, lse))
    check_update((out[:, 4:], lse[:, 4:]), block)
    assert_bits(out[:, :4], before[0][:, :4])
    assert_bits(lse[:, :4], before[1][:, :4])


def test_a_state_of_any_strides(device):
    (values, lses), block = state_and_block((5, 4), 24, device=device)
    out = place(values, device, (49, 248, 2), offset=3)  # tokens between the heads, gaps in a row
    lse = place(lses, device, (2, 11))
    check_update((out, lse), block)


@pytest.mark.parametrize("rows", [(0, 3), (4, 0), (0,), (2, 0, 3)])
def test_no_rows(rows, device):
    out, lse = fresh_state(rows, 16, F32, device)
    update(out, lse, out.to(BF16), lse.clone())


def test_no_elements(device):
    state, block = state_and_block((6, 3), 0, device=device)
    check_update(state, block)


# What it is not allowed to be, and what it takes.


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
def test_a_state_whose_lse_is_not_float32_is_refused(dtype, device):
    """Converted, it would be updated in a temporary, and the caller's stay as it was."""
    (out, lse), block = state_and_block((7, 5), 40, device=device)
    lse = lse.to(dtype)
    before = copies((out, lse))
    name = {BF16: "bfloat16", F16: "float16", F64: "float64"}[dtype]
    message = f"^lse: expected float32, the dtype of every LSE, got {name}$"
    with pytest.raises(ValueError, match=message):
        update_state(out, lse, *block)
    assert_bits(out, before[0])
    assert_bits(lse, before[1])
