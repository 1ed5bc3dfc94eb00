"""Every LSE beside every other one, values at the ends of the formats, NaN and inf everywhere."""

import itertools

import pytest
import torch
from states_support import States, check
from support import BF16, E4M3, F16, F32, F64, INF, NAN, assert_bits, bits
from update_support import update

from merge_attn_states import merge_states

# Ordinary, what FlashAttention 2 and 3 write for an empty row, an error, where exp ends, where
# float32 ends.
LSES = [0.5, -1.5, 0.0, -INF, INF, NAN, 88.7, -104.0, 1e5, -1e5, 3e38, -3e38]
HUGE = [3e38, -3e38]  # in another base they are out of range


def grid(count, dtype, device, without=(), size=8) -> States:
    """Each row another combination; the values of an empty part are NaN."""
    kept = [x for x in LSES if x not in without]
    rows = torch.tensor(list(itertools.product(kept, repeat=count)), dtype=F64)
    random = torch.Generator().manual_seed(0)
    outputs, lses = [], []
    for column in rows.T:
        values = torch.randn(len(rows), 2, size, generator=random, dtype=F64)
        values[column.isinf()] = NAN
        outputs.append(values.to(dtype).to(device))
        lse = column[:, None].expand(-1, 2).to(F64 if dtype == F64 else F32)
        lses.append(lse.contiguous().to(device))
    return States(outputs, lses)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_lse_beside_every_other_one(count, dtype, base, device):
    check(grid(count, dtype, device)._replace(lse_base=base))


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("sink", itertools.pairwise(LSES), ids=str)
def test_beside_a_sink(sink, base, device):
    logits = torch.tensor(sink, device=device)
    check(grid(2, F32, device)._replace(sink=logits, lse_base=base))
    check(grid(2, F64, device)._replace(sink=logits.to(F64), lse_base=base))


@pytest.mark.parametrize("out_base", ["e", "2"])
@pytest.mark.parametrize("bases", ["ee", "22", "e2", "2e"])
def test_in_mixed_bases(bases, out_base, device):
    states = grid(2, F32, device, without=HUGE)._replace(lse_base=bases, out_lse_base=out_base)
    check(states)
    check(states._replace(sink=torch.tensor([0.25, -90.0], device=device)))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)], ids=str)
def test_in_a_running_state(dtypes, device):
    """The bits of the merge of the two."""
    states = grid(2, dtypes[0], device)
    states.outputs[1] = states.outputs[1].to(dtypes[1])
    expected, expected_lse = states.run()
    (out, block), (lse, block_lse) = states.outputs, states.lses
    update(out, lse, block, block_lse)
    assert_bits(out, expected)
    assert_bits(lse, expected_lse)


def test_a_mask_hides_every_lse(device):
    """Also a NaN: the caller says that nobody looked."""
    states = grid(3, F32, device)
    hidden = torch.ones_like(states.lses[1], dtype=torch.bool)
    states.outputs[1].fill_(NAN)
    out, lse = check(states._replace(empty=[None, hidden, None]))
    nothing = torch.full_like(states.lses[1], -INF)
    expected = states._replace(lses=[states.lses[0], nothing, states.lses[2]]).run()
    assert_bits(out, expected[0])
    assert_bits(lse, expected[1])


def test_an_absent_row_hides_every_lse(device):
    states = grid(2, F32, device)
    rows = len(states.lses[0])
    nobody = torch.full((rows,), -1, device=device)
    states.outputs[1].fill_(NAN)
    states.lses[1].fill_(NAN)
    out, lse = check(states._replace(index=[None, nobody]))
    alone, alone_lse = States(states.outputs[:1], states.lses[:1]).run()
    finite = ~alone_lse.isnan()
    assert_bits(out[finite], alone[finite])
    assert_bits(lse[finite], alone_lse[finite])


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("count", [2, 3, 17])
def test_values_at_the_ends_of_the_format(count, dtype, device):
    """A NaN or an infinity of a part with keys stays visible, in its own element alone."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.max / 4, -info.max / 4, INF, -INF, NAN, 1.0]
    outputs = [torch.ones(4, 2, 40, dtype=dtype, device=device) for _ in range(count)]
    lses = [torch.zeros(4, 2, dtype=F64 if dtype == F64 else F32, device=device)] * count
    for k, output in enumerate(outputs):
        output[k % 4, 0, : len(special)] = torch.tensor(special, device=device).to(dtype)
    check(States(outputs, lses))
    plain = [torch.ones_like(output) for output in outputs]
    expected, _ = merge_states(plain, lses)
    out, _ = merge_states(outputs, lses)
    assert_bits(out[..., len(special) :], expected[..., len(special) :])
    assert_bits(out[:, 1], expected[:, 1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_weight_that_underflows_still_multiplies(count, device):
    """Only an empty part is skipped: an infinity far below the others is NaN, and visible."""
    outputs = [torch.ones(3, 2, 40, device=device) for _ in range(count + 1)]
    lses = [torch.zeros(3, 2, device=device) for _ in range(count + 1)]
    outputs[count][1, 0, 5], lses[count][1] = INF, -1e4
    out, lse = check(States(outputs, lses))
    assert out[1, 0, 5].isnan()
    assert out.isnan().sum() == 1
    assert lse.isfinite().all()


def test_a_lone_part_keeps_its_bytes(device):
    """Subnormals, both zeros, NaN with a payload: nothing is converted."""
    words = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16)
    for dtype in (BF16, F16):
        output = words.view(dtype).view(2**16 // 64, 1, 64)
        lse = torch.linspace(-1e5, 1e5, len(output), device=device)[:, None]
        gone = torch.full_like(lse, -INF)
        nothing = torch.full_like(output, NAN)
        for outputs, lses in (([output], [lse]), ([nothing, output, nothing], [gone, lse, gone])):
            out, out_lse = merge_states(outputs, lses)
            assert_bits(out, output)
            assert_bits(out_lse, lse)
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).view(4, 1, 64)
    lse = torch.zeros(4, 1, device=device)
    assert_bits(merge_states([codes], [lse])[0], codes)
    state = torch.full((4, 1, 64), NAN, device=device).to(E4M3)
    update(state, torch.full_like(lse, -INF), codes, lse)
    assert_bits(state, codes)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_nobody(count, device):
    """No part has keys: zeros, of positive sign, and -inf, whatever the values are."""
    for dtype in (F32, BF16, F64):
        outputs = [torch.full((5, 3, 40), -NAN, dtype=dtype, device=device)] * count
        lse = torch.full((5, 3), -INF, dtype=F64 if dtype == F64 else F32, device=device)
        out, out_lse = merge_states(outputs, [lse if k % 2 else -lse for k in range(count)])
        assert (bits(out) == 0).all()
        assert (out_lse == -INF).all()
