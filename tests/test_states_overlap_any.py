"""Any views of one buffer as operands of many parts: an overlap is refused, all else is merged.

The oracle is brute force over the address of every byte. And the same of a running state.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states_support import LN2, States, make_states
from support import BF16, F16, F32, F64, assert_bits, place
from test_overlap import byte_addresses, is_exact_alias
from update_support import copies, state_and_block

from merge_attn_states import update_state


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not set(byte_addresses(a)).isdisjoint(byte_addresses(b))


def overlaps_itself(a: torch.Tensor) -> bool:
    own = byte_addresses(a)
    return len(set(own)) < len(own)


def refused_result(states: States) -> str | None:
    """The result for whose sake the call must be refused; None where it must be merged."""
    outputs, lses = states.parts
    index, out, out_lse = states.index, states.out, states.out_lse
    for name, written, same, others in (
        ("out", out, outputs, lses), ("out_lse", out_lse, lses, outputs),
    ):  # fmt: skip
        if overlaps_itself(written):
            return name
        in_place = index is None
        if any(shares(written, x) for x in same if not (in_place and is_exact_alias(written, x))):
            return name
        further = [*others, *([] if states.sink is None else [states.sink])]
        if any(shares(written, x) for x in further):
            return name
    return "out" if shares(out, out_lse) else None


def draw_view(data, memory, like, name, largest, smallest=0):
    """A view of the memory with the shape and the dtype of `like`, wherever it falls."""
    strides = tuple(data.draw(st.integers(smallest, largest), f"{name} stride") for _ in like.shape)
    offset = data.draw(st.integers(0, 40), f"{name} offset")
    return memory.view(like.dtype).as_strided(like.shape, strides, offset)


def draw_memory(data):
    """Bytes that are ordinary numbers in every dtype, and the largest stride that fits."""
    largest = data.draw(st.sampled_from([12, 200, 3000]), "largest stride")
    memory = torch.zeros((16 * largest + 50) * 8, dtype=torch.uint8)
    memory.view(F16).copy_(1 + torch.rand(len(memory) // 2))
    return memory, largest


def assert_nothing_else_written(memory, before, written) -> None:
    stray = memory != before
    first = memory.data_ptr()
    for tensor in written:
        at = [address - first for address in byte_addresses(tensor)]
        if at and 0 <= at[0] < len(memory):
            stray[torch.tensor(at)] = False
    assert not stray.any()


IN_PLACE = [("out", "outputs"), ("out_lse", "lses")]
PAIRS = [
    ("out", "outputs"), ("out", "lses"), ("out", "out_lse"), ("out", "sink"),
    ("out_lse", "lses"), ("out_lse", "outputs"), ("out_lse", "sink"),
]  # fmt: skip


@given(data=st.data())
def test_any_pair_of_views_of_one_buffer(data):
    rows = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), "rows"))
    dtype = data.draw(st.sampled_from([F32, F16, F64]), "dtype")
    count = data.draw(st.integers(1, 3), "parts")
    states = make_states(rows, data.draw(st.integers(1, 4), "size"), count, dtype, empty=False)
    like = dict(states._asdict(), out=states.outputs[0], out_lse=states.lses[0])
    like["sink"] = states.lses[0].new_zeros(rows[-1])
    states = states._replace(**{name: like[name].clone() for name in ("out", "out_lse", "sink")})
    dim = data.draw(st.none() | st.integers(0, len(rows)), "dim of a stack")
    if dim is not None:
        like |= {name: torch.stack(like[name], dim) for name in ("outputs", "lses")}
        states = states._replace(outputs=like["outputs"], lses=like["lses"], dim=dim)
    elif len(rows) == 2 and data.draw(st.booleans(), "index"):
        states = states._replace(index=[torch.arange(rows[0])] * count)

    memory, largest = draw_memory(data)
    written, other = data.draw(st.sampled_from(PAIRS), "pair")
    which = data.draw(st.integers(0, count - 1), "which")
    is_list = isinstance(like[other], list)
    view = draw_view(data, memory, like[other][which] if is_list else like[other], other, largest)
    if (written, other) in IN_PLACE and data.draw(st.booleans(), "same"):
        result = view if is_list else view.select(dim, which)
    else:
        result = draw_view(data, memory, like[written], written, largest)
    values = [view if k == which else x for k, x in enumerate(like[other])] if is_list else view
    states = states._replace(**{other: values, written: result})
    if data.draw(st.booleans(), "trailing 1"):
        states = states._replace(out_lse=states.out_lse[..., None])

    apart, before = states.clone(), memory.clone()
    if name := refused_result(states):
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            states.run()
        assert torch.equal(memory, before)
        return
    expected, expected_lse = apart.run()
    out, lse = states.run()
    assert_bits(out, expected)
    assert_bits(lse, expected_lse)
    assert_nothing_else_written(memory, before, (out, lse))


# A running state.

NAMES = ("out", "lse", "block_out", "block_lse")
OWN_BLOCK = {"out": "block_out", "lse": "block_lse"}


def refused_state(call: dict[str, torch.Tensor]) -> str | None:
    for name, block in OWN_BLOCK.items():
        if overlaps_itself(call[name]):
            return name
        for other in set(call) - set(OWN_BLOCK):
            may_be_same = other == block and "index" not in call
            if may_be_same and is_exact_alias(call[name], call[other]):
                continue
            if shares(call[name], call[other]):
                return name
    return "out" if shares(call["out"], call["lse"]) else None


STATE_PAIRS = [
    ("out", "block_out"), ("out", "block_lse"), ("out", "lse"), ("lse", "block_out"),
    ("lse", "block_lse"), ("out", "index"), ("lse", "index"),
]  # fmt: skip


@given(data=st.data())
def test_any_pair_of_views_of_one_buffer_of_a_running_state(data):
    rows = data.draw(st.tuples(*[st.integers(1, 4)] * 2), "rows")
    dtypes = data.draw(st.sampled_from([(F32, F32), (F32, BF16), (F64, F64)]), "dtypes")
    state, block = state_and_block(rows, 3, dtypes, empty=False)
    call = dict(zip(NAMES, (*state, *block), strict=True))
    memory, largest = draw_memory(data)
    first, second = data.draw(st.sampled_from(STATE_PAIRS), "pair")
    if second == "index" or data.draw(st.booleans(), "index"):
        call["index"] = torch.randperm(rows[0])
    call[first] = draw_view(data, memory, call[first], first, largest)
    fits = OWN_BLOCK[first] == second and call[first].dtype == call[second].dtype
    if second == "index":  # of two that are one element, which number it is could not be said
        view = draw_view(data, memory, call["index"], "index", largest, smallest=1)
        call["index"] = view.copy_(call["index"])
    elif fits and data.draw(st.booleans(), "same"):
        call[second] = call[first]
    else:
        call[second] = draw_view(data, memory, call[second], second, largest)
    for name in ("lse", "block_lse"):
        if data.draw(st.booleans(), f"{name} with a trailing 1"):
            call[name] = call[name][..., None]

    apart, before = {name: x.clone() for name, x in call.items()}, memory.clone()
    if name := refused_state(call):
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            update_state(**call)
        assert torch.equal(memory, before)
        return
    update_state(**apart)
    update_state(**call)
    assert_bits(call["out"], apart["out"])
    assert_bits(call["lse"], apart["lse"])
    assert_nothing_else_written(memory, before, (call["out"], call["lse"]))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("of_block", [False, True])
def test_a_state_that_is_its_own_block(of_block, own, device):
    """Twice the keys: the same values, an LSE that is ln 2 more. With a trailing 1 or without."""
    (out, lse), _ = state_and_block((5, 3), 16, (F32, F32), device, empty=False)
    before = copies((out, lse))
    update_state(out, lse[..., None] if own else lse, out, lse[..., None] if of_block else lse)
    torch.testing.assert_close(out, before[0])
    torch.testing.assert_close(lse, before[1] + LN2)


def test_a_block_beside_an_index_is_never_the_state(device):
    """Its rows are read while others are written."""
    (out, lse), (block_out, block_lse) = state_and_block((9, 3), 16, (F32, F32), device)
    index = torch.tensor([3, 8, -1, 0], device=device)
    before = copies((out, lse))
    for block in ((out[:4], block_lse[:4]), (out[5:], block_lse[:4]), (out[1::2], block_lse[:4])):
        message = r"^out: expected no memory in common with block_out, got an overlap$"
        with pytest.raises(ValueError, match=message):
            update_state(out, lse, *block, index=index)
    message = r"^lse: expected no memory in common with block_lse, got an overlap$"
    with pytest.raises(ValueError, match=message):
        update_state(out, lse, block_out[:4], lse[5:], index=index)
    assert_bits(out, before[0])
    assert_bits(lse, before[1])
    # Rows of one buffer that the state has not.
    rows = place(torch.randn(18, 3, 17), device)
    other = rows.clone()
    operands = [
        (x[::2, :, :16], x[::2, :, 16], x[1:9:2, :, :16], x[1:9:2, :, 16]) for x in (rows, other)
    ]
    update_state(*operands[0], index=index)
    update_state(*operands[1][:2], *copies(operands[1][2:]), index=index)
    assert_bits(rows, other)
