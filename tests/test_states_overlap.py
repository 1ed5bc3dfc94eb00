"""What partly shares memory with a result of many parts is refused, whatever operand it is."""

import pytest
import torch
from states_support import States, make_states, operator_args
from support import BF16, E4M3, F32, OPERATOR_ERROR, blank, place

from merge_attn_states import merge_states

OPS = torch.ops.merge_attn_states
N, H, D, K = 6, 4, 16, 3


def parts(device="cpu", dtype=F32, rows=(N, H), **options) -> States:
    return make_states(rows, D, K, dtype, device, empty=False, **options)


def shared(*shape, dtype=F32, device="cpu"):
    """A buffer of random values to cut operands from."""
    return place(torch.randn(shape).to(dtype), device)


# What an output or its LSE has in common with anything else: name: (operands, who is named).

OVERLAPS = {
    "one token later": lambda b: ({"out": b[4:10], "outputs[1]": b[5:11]}, "outputs[1] or"),
    "one element later": lambda b: (
        {"out": flat(b, 0), "outputs[2]": flat(b, 1)}, "outputs[2] or"),
    "the last byte only": lambda b: (
        {"out": flat(b, 0), "outputs[2]": flat(b, N * H * D - 1)}, "outputs[2] or"),
    "the same bytes, heads first": lambda b: (
        {"out": flat(b, 0), "outputs[0]": flat(b, 0).view(H, N, D).transpose(0, 1)},
        "outputs[0] or"),
    "the same memory as another dtype": lambda b: (
        {"out": flat(b, 0), "outputs[1]": b.view(-1).view(BF16)[: N * H * D].view(N, H, D)},
        "outputs[1] or"),
    "an expanded part": lambda b: (
        {"out": b[:N], "outputs[0]": b[3:4].expand(N, H, D)}, "outputs[0] or"),
    "an lse": lambda b: ({"out": b[:N], "lses[1]": b[5:11, :, 3]}, "lses[1],"),
    "a mask": lambda b: (
        {"out": b[:N], "empty[2]": b.view(torch.bool)[2:8, :, 3]}, "empty[2],"),
    "a sink": lambda b: ({"out": b[:N], "sink": b[3, :, 5]}, "sink,"),
    "a scale": lambda b: (
        {"out": b.view(E4M3)[:N, :, :D], "out_scale": b[1, 1, 1]}, "out_scale,"),
    "its own lse": lambda b: ({"out": b[:N], "out_lse": b[5:11, :, 3]}, "out_lse,"),
    "an output of the lse": lambda b: (
        {"out_lse": b[2:8, :, 1], "outputs[1]": b[:N]}, "outputs[1],"),
    "the lse one token later": lambda b: (
        {"out_lse": b[:N, :, 0], "lses[2]": b[1 : N + 1, :, 0]}, "lses[2] or"),
    "the lse transposed": lambda b: (
        {"out_lse": b.view(-1)[:24].view(N, H), "lses[0]": b.view(-1)[:24].view(H, N).T},
        "lses[0] or"),
    "the lse transposed, with a trailing 1": lambda b: (
        {"out_lse": b.view(-1)[:24].view(N, H, 1), "lses[0]": b.view(-1)[:24].view(H, N).T},
        "lses[0] or"),
    "a mask of the lse": lambda b: (
        {"out_lse": b[:N, :, 0], "empty[0]": b.view(torch.bool)[:N, :, 2]}, "empty[0],"),
    "a sink of the lse": lambda b: ({"out_lse": b[:N, :, 0], "sink": b[3, :, 0]}, "sink,"),
    "a scale of the lse": lambda b: (
        {"out_lse": b[:N, :, 0], "out_scale": b[3, 3, 0], "out": blank((N, H, D), E4M3, b.device)},
        "out_scale,"),
}  # fmt: skip


def flat(buffer, offset):
    return buffer.view(-1)[offset : offset + N * H * D].view(N, H, D)


def with_operands(states: States, operands) -> States:
    for name, operand in operands.items():
        field, _, part = name.partition("[")
        if part:
            values = list(getattr(states, field) or [None] * K)
            values[int(part[:-1])] = operand
            operand = values
        states = states._replace(**{field: operand})
    return states


@pytest.mark.parametrize("way", ["python", "torch.ops"])
@pytest.mark.parametrize("case", OVERLAPS)
def test_an_overlap_is_refused(case, way, device):
    buffer = shared(12, H, D, device=device)
    operands, beside = OVERLAPS[case](buffer)
    states = parts(device)._replace(out=blank((N, H, D), F32, device))
    states = with_operands(states, operands)
    before = buffer.clone()
    written = "out_lse" if "out" not in operands or "of the lse" in case else "out"
    kind = ValueError if way == "python" else OPERATOR_ERROR
    with pytest.raises(kind) as error:
        if way == "python":
            states.run()
        else:
            OPS.merge_states_out(
                states.out, states.out_lse, *operator_args(states), states.out_scale
            )
    name, _, rest = beside.partition(" ")
    same = " or exactly its memory with its strides, got a partial overlap"
    end = f"{name}{same}" if rest else f"{name} got an overlap"
    assert str(error.value) == f"{written}: expected no memory in common with {end}"
    assert torch.equal(buffer, before)


@pytest.mark.parametrize(("name", "make"), [
    ("out", lambda b: b[:1].expand(N, H, D)),
    ("out", lambda b: b.as_strided((N, H, D), (H * D, D - 1, 1))),
    ("out_lse", lambda b: b[0, 0, :H].expand(N, H)),
    ("out_lse", lambda b: b.as_strided((N, H), (H - 1, 1))),
    ("out_lse", lambda b: b.as_strided((N, H, 1), (H - 1, 1, 100))),
])  # fmt: skip
def test_a_result_that_overlaps_itself_is_refused(name, make, device):
    buffer = shared(12, H, D, device=device)
    before = buffer.clone()
    result = make(buffer)
    message = (
        f"{name}: expected memory of its own for each element, got sizes {list(result.shape)} "
        f"with strides {list(result.stride())} that overlap themselves"
    )
    with pytest.raises(ValueError, match=r"that overlap themselves$") as error:
        parts(device)._replace(**{name: result}).run()
    assert str(error.value) == message
    assert torch.equal(buffer, before)


STACKS = {
    "behind a slice by a token": lambda b: (b[:K], b.view(-1, H, D)[1 : N + 1]),
    "over two slices": lambda b: (b[:K], b.view(-1, H, D)[N - 1 : 2 * N - 1]),
    "a slice, heads first": lambda b: (
        b[:K], b[1].view(H, N, D).transpose(0, 1)),
    "a slice that another slice overlaps": lambda b: (
        b.as_strided((K, N, H, D), (D, H * D, D, 1), b.storage_offset()),
        b.as_strided((N, H, D), (H * D, D, 1), b.storage_offset())),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKS)
def test_a_result_that_is_no_slice_of_the_stack_is_refused(case, device):
    buffer = shared(K + 1, N, H, D, device=device)
    stack, out = STACKS[case](buffer)
    before = buffer.clone()
    lses = torch.zeros(K, N, H, device=device)
    message = r"^out: expected no memory in common with outputs or exactly its memory with its"
    with pytest.raises(ValueError, match=message):
        merge_states(stack, lses, dim=0, out=out)
    assert torch.equal(buffer, before)


def test_an_lse_of_a_stack_inside_the_output(device):
    buffer = shared(K, N, H, D, device=device)
    before = buffer.clone()
    for own, of_parts in (("out", "lses"), ("out_lse", "outputs")):
        stack = torch.zeros_like(buffer)
        operands = {"out": buffer[0], "lses": buffer[..., 3]} if own == "out" else {
            "out_lse": buffer[1, :, :, 2], "outputs": buffer}  # fmt: skip
        states = States(stack, stack[..., 0], dim=0)._replace(**operands)
        message = rf"^{own}: expected no memory in common with {of_parts}, got an overlap$"
        with pytest.raises(ValueError, match=message):
            states.run()
    assert torch.equal(buffer, before)


def test_a_result_beside_an_index_is_never_a_part(device):
    states = parts(device)
    index = [None, torch.arange(N, device=device), None]
    for which in range(K):
        message = rf"^out: expected no memory in common with outputs\[{which}\], got an overlap$"
        with pytest.raises(ValueError, match=message):
            states._replace(index=index, out=states.outputs[which]).run()
        message = rf"^out_lse: expected no memory in common with lses\[{which}\], got an overlap$"
        with pytest.raises(ValueError, match=message):
            states._replace(index=index, out_lse=states.lses[which]).run()
    numbers = torch.arange(4 * N * H * D, device=device)
    out = numbers.view(F32)[: N * H * D].view(N, H, D)
    message = r"^out: expected no memory in common with index\[0\], got an overlap$"
    with pytest.raises(ValueError, match=message):
        states._replace(index=[numbers[:N], None, None], out=out).run()
    assert torch.equal(numbers, torch.arange(4 * N * H * D, device=device))


@pytest.mark.parametrize("stacked", [False, True])
def test_two_that_begin_at_one_address_overlap(stacked, device):
    """However their strides hide it: the library's search for a common byte gives up on these."""
    shape, strides = (5, 15, 38), ((1189, 1352, 1054), (2531, 877, 1934))
    buffer = torch.full((100_000,), float("nan"), device=device)
    out, part = (buffer.as_strided(shape, own) for own in strides)
    lses = torch.zeros(1, *shape[:2], device=device)
    outputs = part[None] if stacked else [part]
    with pytest.raises(ValueError, match=r"^out: .* in common with outputs.* overlap"):
        merge_states(outputs, lses if stacked else [lses[0]], dim=0 if stacked else None, out=out)
    assert buffer.isnan().all()
